"""Ends a program whose step hangs, so that its launcher starts it again.

On many hosts one that is stuck, but not dead, keeps all others waiting for
ever, inside calls that no Python code can interrupt. A timer of the standard
library's faulthandler, which needs neither the interpreter nor its lock, then
writes the stacks of all threads to stderr and exits with 1.
"""

import collections
from collections.abc import Iterator
import contextlib
import faulthandler
import sys
import time

_FACTOR = 10  # a step is late after so many times the longest recent one
_RECENT = 200  # steps
_PATIENCE = 4  # times the limit, for what takes long: compiling, sampling


class Watchdog:
  """While entered, a step that takes far longer than usual ends the program.

  The host runs ahead of the device, and notices a hang at the latest where it
  waits for results, at a logging point.
  """

  def __init__(self, seconds: float):
    """At least `seconds` are given to each step; 0 turns it off."""
    self._seconds = seconds
    self._recent = collections.deque(maxlen=_RECENT)
    self._last = None

  @property
  def limit(self) -> float:
    """Seconds that a step may now take."""
    return max(self._seconds, _FACTOR * max(self._recent, default=0.0))

  def step_done(self) -> None:
    """Notes the step's duration and gives the next one its time."""
    now = time.monotonic()
    if self._last is not None:
      self._recent.append(now - self._last)
    self._last = now
    self._arm(self.limit)

  @contextlib.contextmanager
  def patient(self) -> Iterator[None]:
    """Gives the block several times the limit; it does not count as a step."""
    self._arm(_PATIENCE * self.limit)
    yield
    if self._last is None:  # the first step compiles, and is still to come
      self._arm(_PATIENCE * self.limit)
      return
    self._last = time.monotonic()
    self._arm(self.limit)

  def _arm(self, seconds: float) -> None:
    if self._seconds > 0:
      # sys.__stderr__, as what replaces sys.stderr may be no file.
      faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

  def __enter__(self) -> "Watchdog":
    self._arm(_PATIENCE * self.limit)  # the first step compiles
    return self

  def __exit__(self, *_) -> None:
    if self._seconds > 0:
      faulthandler.cancel_dump_traceback_later()
