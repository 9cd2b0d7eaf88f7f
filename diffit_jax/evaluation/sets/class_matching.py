"""Which class of the samples is which class of the reference.

A class's number is its place in the list of its own set: class 0 of one set may
be class 1 of another. So classes are told to be the same

  by name    where both sides have names;
  by number  where one side has numbers alone, and either the other's names are
             these numbers, or both sides have the same numbers

and where neither says it, or the two ways of a number say different things, the
comparison is refused.
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
    source: of the images, for messages.
    labels: [n] of the images, from 0 on.
    names: of the classes 0, 1, ...; None where numbers are all that is known.
    num: how many classes there are, whether or not the images have them all;
      None where that is not known.
  """

  source: str
  labels: np.ndarray
  names: Sequence[str] | None = None
  num: int | None = None

  def present(self) -> list[int]:
    """The classes that the images have."""
    return np.unique(self.labels).tolist()

  def numbers(self) -> set[int]:
    """The numbers that classes of this set can have, as far as is known."""
    num = len(self.names) if self.names else self.num
    return set(self.present()) if num is None else set(range(num))

  def by_numeral(self) -> dict[int, int] | None:
    """{number that a class is called by: its number}; None where words are.

    A set without names calls its classes by their numbers.
    """
    if not self.names:
      return {i: i for i in self.numbers()}
    if not all(re.fullmatch("[0-9]+", name) for name in self.names):
      return None
    found = {int(name): i for i, name in enumerate(self.names)}
    return found if len(found) == len(self.names) else None

  def has_numbers_alone(self) -> bool:
    """Whether there are no names, or only 0, 1, ... as made up for none."""
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
    pairs: (title, number in the samples, number in the reference) of each class
      that the samples have.
    rule: how it is known, in words.
  """

  pairs: list[tuple[str, int, int]]
  rule: str


def match(samples: Classes, reference: Classes) -> Match:
  """Finds each class of the samples in the reference.

  Raises:
    UserError: one is not there, or nothing says which one it is.
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
  """{number in the samples: in the reference}, if names are the same numbers.

  Of one side without names, the numbers must be all that the other is called
  by: were some missing, they could as well be places in its list.
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
  """The same numbers, where both have the same and names do not speak."""
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
