"""SIGTERM as a wish: finish what is under way, save, and exit with 75."""

import signal
import threading


class StopRequest:
  """While entered, SIGTERM sets `requested` instead of ending the process.

  Outside the main thread, where Python allows no handlers, nothing changes.
  """

  def __init__(self):
    self.requested = False
    self._previous = None

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._request)
    return self

  def __exit__(self, *_) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _request(self, *_) -> None:
    self.requested = True
