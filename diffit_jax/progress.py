"""Progress of long work: a bar on a terminal, plain lines otherwise."""

import sys
import time

from absl import logging
import tqdm


def duration(seconds: float) -> str:
  """A length of time in a unit that fits: 40 s, 3.3 min, 5.1 h, 12.0 d."""
  for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} s"


class Progress:
  """Counts `update`s towards `total` and shows rate and time left.

  Attributes:
    total: how many units the whole work has; None where it is not known.
    label: what is being done, for example "sampling".
    unit: what is counted, for example "images".
    initial: units that an earlier, interrupted run had already done.
    every_seconds: how often a plain line is printed where no terminal is.
    quiet: shows nothing, as in all processes but one.
  """

  def __init__(
    self,
    total: int | None,
    label: str,
    unit: str,
    initial: int = 0,
    every_seconds: float = 10.0,
    quiet: bool = False,
  ):
    self._quiet = quiet
    self._is_terminal = sys.stderr.isatty()
    self._label, self._unit, self._every = label, unit, every_seconds
    self._next_line = time.monotonic() + every_seconds
    self._bar = tqdm.tqdm(
      total=total,
      desc=label,
      unit=f" {unit}",
      initial=initial,
      disable=quiet or not self._is_terminal,
      dynamic_ncols=True,
    )
    self._total, self._done, self._initial = total, initial, initial
    self._start = time.monotonic()

  def update(self, count: int = 1, note: str = "") -> None:
    """Adds `count` finished units; `note` is shown beside them."""
    self._done += count
    self._bar.update(count)
    if note:
      self._bar.set_postfix_str(note, refresh=False)
    if self._quiet or self._is_terminal:
      return
    if time.monotonic() >= self._next_line:
      self._next_line = time.monotonic() + self._every
      logging.info("%s", self.line(note))

  def line(self, note: str = "") -> str:
    """The plain line: done, total, rate and seconds left."""
    seconds = max(time.monotonic() - self._start, 1e-9)
    rate = (self._done - self._initial) / seconds
    text = f"{self._label}: {self._done}"
    if self._total:
      text += f"/{self._total}"
    text += f" {self._unit}, {rate:.3g}/s"
    if self._total and rate > 0:
      text += f", {duration((self._total - self._done) / rate)} left"
    return f"{text}, {note}" if note else text

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()
