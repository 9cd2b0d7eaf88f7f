"""Rows of figures: how stages make them, and how they are merged and kept.

A row is {"stage", "commit", "date", "card", "tiny", "case", column: value}. It
holds "skipped" or "error", with the reason, where there is no figure. Rows are
appended to a file as they are made, so that those of a stage that is ended
stay. Only the standard library: see `stages`.
"""

from collections.abc import Callable, Iterable
import dataclasses
import json
import os
import pathlib
import time

GROUP = ("card", "commit", "date", "tiny")  # only these may be compared
KEY = ("stage", *GROUP)
PROCESS = "process"  # the case that says how a stage's process ended


@dataclasses.dataclass
class Record:
  """The rows of one stage, as it makes them.

  Attributes:
    path: file to append to.
    about: what every row holds: stage, commit, date, card, tiny.
    end: of the stage's time, in seconds of `time.time()`.
  """

  path: str | os.PathLike
  about: dict
  end: float

  @property
  def is_tiny(self) -> bool:
    return self.about["tiny"]

  def left(self) -> float:
    """Seconds before the stage is ended."""
    return self.end - time.time()

  def add(self, case: str, **columns) -> None:
    """Writes one row; some names of columns are no names of Python's."""
    append(self.path, {**self.about, "case": case, **columns})

  def attempt(
    self,
    case: str,
    function: Callable[[], dict],
    least: float = 8.0,
    **columns,
  ) -> None:
    """Writes the row that `function` measures, or why there is none.

    Args:
      case: what is measured.
      function: () -> columns.
      least: seconds that must be left to begin.
      **columns: of the row in any case.
    """
    if not self.is_tiny and self.left() < least:
      found = {"skipped": f"{self.left():.0f} s were left, {least:.0f} wanted"}
    else:
      try:
        found = function()
      except Exception as error:  # noqa: BLE001  one case must not end the rest
        found = {"error": first_lines(error)}
    self.add(case, **columns, **found)


def first_lines(error: BaseException) -> str:
  """An exception as one line of text."""
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def append(path: str | os.PathLike, row: dict) -> None:
  """Adds a row to a file of one row a line, in one write."""
  with open(path, "a") as file:
    file.write(json.dumps(row) + "\n")


def read(path: str | os.PathLike) -> list[dict]:
  """Rows of such a file; a line that a kill cut short is passed over."""
  path, found = pathlib.Path(path), []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      found.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return found


def key(row: dict, names: Iterable[str] = KEY) -> tuple:
  return tuple(row[name] for name in names)


def merge(old: list[dict], new: list[dict]) -> list[dict]:
  """Old and new rows; a stage's new rows replace all old ones of its key.

  Args:
    old: rows.
    new: rows; the key is stage, card, commit, date and tiny.
  """
  replaced = {key(row) for row in new}
  return [row for row in old if key(row) not in replaced] + new


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
  """{card, commit, date, tiny: rows}, the newest first."""
  found = {}
  for row in rows:
    found.setdefault(key(row, GROUP), []).append(row)
  date = GROUP.index("date")
  return dict(sorted(found.items(), key=lambda x: x[0][date], reverse=True))


def load(path: str | os.PathLike) -> list[dict]:
  """Rows that `save` wrote; none where there is no file."""
  path = pathlib.Path(path)
  return json.loads(path.read_text()) if path.exists() else []


def save(path: str | os.PathLike, rows: list[dict]) -> None:
  """Writes a JSON list with one row a line, whole or not at all."""
  path = pathlib.Path(path)
  partial = path.with_suffix(".partial")
  lines = ",\n".join(json.dumps(row) for row in rows)
  partial.write_text(f"[\n{lines}\n]\n")
  os.replace(partial, path)
