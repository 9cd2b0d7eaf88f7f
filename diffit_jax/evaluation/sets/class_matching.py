"""Which class of the samples is which class of the reference.

A class's number is its place in the list of its own set: class 0 of one set may
be class 1 of another. So classes are matched

  by name    if both sides have names;
  by number  if one side has only numbers, and either the other's names are
             these numbers, or both sides have the same numbers.

If neither rule decides, or the two ways to use numbers disagree, the comparison
is refused.
"""

from collections.abc import Sequence
import dataclasses
import re

from absl import logging
import numpy as np

from diffit_jax.errors import UserError

_SHOWN = 8  # classes in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Classes:
  """The classes of a set of images.

  Attributes:
    source: name of the set, for messages.
    labels: [n] class number of each image, from 0 on.
    names: names of the classes 0, 1, ...; None if only numbers are known.
    num: number of classes, which may be more than the images have; None if it
      is not known.
  """

  source: str
  labels: np.ndarray
  names: Sequence[str] | None = None
  num: int | None = None

  def present(self) -> list[int]:
    """The classes that the images have."""
    return np.unique(self.labels).tolist()

  def numbers(self) -> set[int]:
    """All class numbers of this set, as far as they are known."""
    num = len(self.names) if self.names else self.num
    return set(self.present()) if num is None else set(range(num))

  def by_numeral(self) -> dict[int, int] | None:
    """{name of a class, read as a number: its number}; None if it is a word.

    A set without names calls its classes by their numbers.
    """
    if not self.names:
      return {i: i for i in self.numbers()}
    if not all(re.fullmatch("[0-9]+", name) for name in self.names):
      return None
    found = {int(name): i for i, name in enumerate(self.names)}
    return found if len(found) == len(self.names) else None

  def has_numbers_alone(self) -> bool:
    """Whether there are no names, or only the made-up names 0, 1, ..."""
    return not self.names or list(self.names) == [
      str(i) for i in range(len(self.names))
    ]

  def __str__(self) -> str:
    names = self.names or [str(number) for number in sorted(self.numbers())]
    more = ", ..." * (len(names) > _SHOWN)
    kind = "" if self.names else "numbers alone: "
    return f"{self.source} ({kind}{', '.join(names[:_SHOWN])}{more})"


@dataclasses.dataclass(frozen=True)
class Match:
  """Which classes are the same.

  Attributes:
    pairs: (title, number in the samples, number in the reference) for each
      class that the samples have.
    rule: "by name" or "by number".
  """

  pairs: list[tuple[str, int, int]]
  rule: str


def match(samples: Classes, reference: Classes) -> Match:
  """Finds each class of the samples in the reference.

  Raises:
    UserError: a class is not there, or no rule decides which one it is.
  """
  present = samples.present()
  if strange := {*present} - samples.numbers():
    raise UserError(
      f"--per_class: samples of class {min(strange)} are of none of the classes"
      f" of {samples}"
    )
  have_names = bool(samples.names and reference.names)
  if have_names:
    theirs = {name: i for i, name in enumerate(reference.names)}
    found = {i: theirs.get(samples.names[i]) for i in present}
    if None not in found.values():
      return _match(samples, reference, found, "by name")
  ways = [_as_numerals(samples, reference), _as_places(samples, reference)]
  ways = [way for way in ways if way]
  if ways and all(way == ways[0] for way in ways):
    return _match(samples, reference, ways[0], "by number")
  if have_names:
    missing = next(i for i in present if found[i] is None)
    raise UserError(
      f"--per_class: the class {samples.names[missing]!r} of {samples} is not"
      f" among those of {reference}"
    )
  raise UserError(
    f"--per_class cannot tell which classes of {samples} are which of"
    f" {reference}: give both as folders with a sub-folder for each class, or"
    " as prepared data sets, with the same names"
  )


def _as_numerals(samples: Classes, reference: Classes) -> dict | None:
  """{number in the samples: number in the reference}, from names as numbers.

  If one side has no names, its numbers must be all of the other's names: if
  some are missing, the numbers could as well be places in the other's list.
  """
  ours, theirs = samples.by_numeral(), reference.by_numeral()
  named = [each for each in (samples, reference) if each.names]
  if ours is None or theirs is None or not named:
    return None
  is_sure = len(named) == 2 or named[0].has_numbers_alone()
  if not is_sure and ours.keys() != theirs.keys():
    return None
  called = {number: name for name, number in ours.items()}
  found = {i: theirs.get(called[i]) for i in samples.present()}
  return None if None in found.values() else found


def _as_places(samples: Classes, reference: Classes) -> dict | None:
  """The same numbers on both sides, if names do not decide otherwise."""
  if samples.names and reference.names:
    sides = (samples, reference)
    if None not in [each.by_numeral() for each in sides]:
      return None
    if not any(each.has_numbers_alone() for each in sides):
      return None
  if samples.numbers() != reference.numbers():
    return None
  return {i: i for i in samples.present()}


def _match(
  samples: Classes, reference: Classes, found: dict[int, int], rule: str
) -> Match:
  names = reference.names
  pairs = [
    (names[theirs] if names else str(theirs), ours, theirs)
    for ours, theirs in found.items()
  ]
  shown = ", ".join(f"{ours} is {name}" for name, ours, _ in pairs[:_SHOWN])
  more = ", ..." * (len(pairs) > _SHOWN)
  logging.info("classes are compared %s: %s%s", rule, shown, more)
  return Match(pairs, rule)
