"""Requests to stop (SIGTERM, preemption): finish what is under way, save."""

from collections.abc import Callable
import signal
import threading


class Stopped(Exception):
  """A request to stop was followed: what was done is kept, to be gone on from.

  `cli.run` turns it into the exit code 75.
  """


class StopRequest:
  """While entered, SIGTERM sets `requested` instead of ending the process.

  Outside the main thread, where Python allows no handlers, nothing changes.

  With several processes a signal in one must stop all of them at the same step,
  and `agreed` decides: it catches the signals itself, and is asked after every
  step. Then call `begin` before the first step and `at_step` after each.
  """

  def __init__(self, agreed: Callable[[int], bool] | None = None):
    """`agreed` is as from `runtime.preemption_notice`; None for one process."""
    self.requested = False
    self._agreed = agreed
    self._previous = None

  def begin(self, step: int) -> None:
    """Tells from which step the run goes on."""
    if self._agreed is None:
      return
    # A signal that came before any process was here asked for step 1.
    if step > 1 and self._agreed(1):
      self.requested = True
    self.at_step(step)

  def at_step(self, step: int) -> None:
    """Tells that `step` steps are done; sets `requested` in all or none."""
    if self._agreed is not None and not self.requested:
      self.requested = self._agreed(step)

  def __enter__(self) -> "StopRequest":
    is_main = threading.current_thread() is threading.main_thread()
    if self._agreed is None and is_main:
      self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *_) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _request(self, *_) -> None:
    self.requested = True
