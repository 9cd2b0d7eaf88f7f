"""Which class an image belongs to, and what a set's classes are called.

Labels:
  dataset.json   EDM's layout: {"labels": [["00000/img00000000.png", 3], ...]}
                 names every image, or `"labels": null` says there are none.
  no such file   images in sub-folders belong to the class of their top-most
                 folder; images that lie side by side have no labels. Classes
                 are numbered in sorted order of their folders, which is
                 numerical where all folders are called by numbers (2 before
                 10).

A folder that only wraps the set, as archives often have one, is no class: the
set begins inside of it.
"""

from collections.abc import Collection, Mapping, Sequence
import json
import os
import re
from typing import Any

from absl import logging

from diffit_jax.errors import UserError

LABELS_FILE = "dataset.json"
_MAX_LABEL = 999_999
_SHOWN = 20  # classes that are told one by one


def normalize(name: str) -> str:
  """A name without empty and "." parts: ./cat//1.png is cat/1.png."""
  return "/".join(part for part in name.split("/") if part not in ("", "."))


def name_as_text(name: str) -> str:
  """A file's name, which is bytes to the file system, as proper text."""
  return os.fsencode(name).decode("utf-8", "backslashreplace")


def wrapping_folder(
  names: Collection[str], labels_files: Collection[str]
) -> str:
  """The folder, ending in "/", that only wraps a set of images; "" for none.

  It is all that there is at its level, and holds dataset.json or nothing but
  folders.

  Args:
    names: names of the images, one or more.
    labels_files: names of all files that are called dataset.json.
  """
  wrapper = ""
  while wrapper + LABELS_FILE not in labels_files:
    inner = [name.removeprefix(wrapper) for name in names]
    top = inner[0].partition("/")[0] + "/"
    if not all(name.startswith(top) for name in inner):
      break
    holds_labels = wrapper + top + LABELS_FILE in labels_files
    if not holds_labels and any(name.count("/") < 2 for name in inner):
      break  # one class
    wrapper += top
  return wrapper


def of_json(
  text: bytes, names: Collection[str], wrapper: str, path: str
) -> tuple[dict[str, int], list[str]]:
  """Labels by dataset.json.

  Args:
    text: text of the file.
    names: names of all images.
    wrapper: what the file's names are relative to, see `wrapping_folder`.
    path: path of the source, for errors.

  Returns:
    {name: class} and the names of the classes 0, 1, ...

  Raises:
    UserError: another form, or it does not fit the images.
  """
  where = f"{LABELS_FILE} of {path}"
  try:
    pairs = json.loads(text)["labels"]
    if not pairs:
      return {}, []
    labels = {wrapper + normalize(name): label for name, label in pairs}
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise _wrong_form(where, error) from error
  except RecursionError as error:
    raise _wrong_form(where, "brackets within brackets without end") from error
  if len(labels) != len(pairs):
    raise UserError(f"{where} names an image twice")
  for name, label in labels.items():
    if name not in names:
      raise UserError(f"{where} names {name!r}, which is not there")
    if type(label) is not int or not 0 <= label <= _MAX_LABEL:
      raise UserError(
        f"{where} gives {name!r} the label {label!r}: labels are whole"
        f" numbers from 0 to {_MAX_LABEL}"
      )
  missing = next((name for name in names if name not in labels), None)
  if missing is not None:
    raise UserError(f"{where} gives no label to {missing!r}")
  return labels, [str(label) for label in range(max(labels.values()) + 1)]


def _wrong_form(where: str, reason: object) -> UserError:
  return UserError(
    f'{where} is not of the form {{"labels": [[name, class], ...]}} or'
    f' {{"labels": null}} ({reason})'
  )


def of_folders(
  names: Collection[str], wrapper: str, path: str
) -> tuple[dict[str, int], list[str]]:
  """Labels by the folders that images lie in.

  Args:
    names: names of all images.
    wrapper: see `wrapping_folder`.
    path: path of the source, for messages.

  Returns:
    {name: class} and the names of the classes; both empty for images that lie
    side by side.

  Raises:
    UserError: images in folders and beside them, or folders whose names are
      the same but for blanks.
  """
  inner = {name: name.removeprefix(wrapper) for name in names}
  folders = {name: x.split("/")[0] for name, x in inner.items() if "/" in x}
  if not folders:
    return {}, []
  loose = next((name for name in names if name not in folders), None)
  if loose is not None:
    raise UserError(
      f"--source={path} has images in sub-folders (classes) and outside of"
      f" them ({loose!r}): which class are those?"
    )
  if wrapper:
    logging.info(
      "all of %s lies in the folder %s: its sub-folders are the classes",
      path,
      wrapper,
    )
  ordered = _in_order(set(folders.values()), path)
  if len(ordered) == 1:
    logging.warning(
      "the images of %s lie in one folder, %r, and are of one class; put them"
      " side by side for a set without classes",
      path,
      ordered[0],
    )
  number = {folder: index for index, folder in enumerate(ordered)}
  labels = {name: number[folder] for name, folder in folders.items()}
  return labels, _class_names(ordered, path)


def _in_order(folders: Collection[str], path: str) -> list[str]:
  """Sorted; by number where all are numbers, which is told if it matters."""
  as_text = sorted(folders)
  if not all(re.fullmatch("[0-9]+", folder) for folder in folders):
    return as_text
  by_number = sorted(folders, key=lambda folder: (int(folder), folder))
  if by_number != as_text:
    logging.info(
      "the class folders of %s are called by numbers and are in numerical"
      " order: class 0 is folder %s, the last one is folder %s",
      path,
      by_number[0],
      by_number[-1],
    )
  return by_number


def _class_names(folders: Sequence[str], path: str) -> list[str]:
  """Names as TFDS can keep them: a line each, without blanks at the ends."""
  found = {}
  for folder in folders:
    name = "".join(
      c if c.isprintable() else c.encode("unicode_escape").decode()
      for c in name_as_text(folder).strip()
    )
    if not name or name in found:
      raise UserError(
        f"the class folder {folder!r} of {path} has"
        f" {f'the same name as {found[name]!r}' if name else 'no name'} but"
        " for blanks: rename it"
      )
    found[name] = folder
  return list(found)


def count(counts: Mapping[int, int], names: Sequence[str]) -> list[int]:
  """Images of class 0, 1, ... from {class: images}; [] without classes."""
  return [counts.get(label, 0) for label in range(len(names))]


def in_words(metadata: Mapping[str, Any]) -> str:
  """The classes of a prepared data set, in a line; short where there are many.

  Args:
    metadata: metadata of the set; "images_per_class" may be missing in an older
      one.
  """
  names, counts = metadata["class_names"], metadata.get("images_per_class")
  if not names:
    return "no classes"
  say = lambda i: f"{i} = {names[i]}" + (f" ({counts[i]})" if counts else "")
  shown = [say(i) for i in range(len(names))]
  if len(names) > _SHOWN:
    shown = [*shown[:3], "...", shown[-1]]
  text = f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(shown)}"
  if counts and len(names) > _SHOWN:
    text += f"; {min(counts)} to {max(counts)} images in each"
  num_empty = counts.count(0) if counts else 0
  return text + f"; {num_empty} of them without images" * bool(num_empty)
