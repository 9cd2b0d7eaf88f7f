"""What ^C does to a command: one line, exit code 130, and no crash.

Extension modules crash, or lose the exception, when KeyboardInterrupt is raised
while they are imported. Before its imports are done a command has begun
nothing, so there the process ends at once.
"""

import os
import signal
import types

CODE = 130
MESSAGE = "interrupted; run the same command again to continue"
_IMPORTER = "<frozen importlib._bootstrap>"  # file name of import's own frames


def handle() -> None:
  """Takes ^C over from Python; where it is ignored, it stays so."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, on_signal)


def on_signal(number: int, frame: types.FrameType | None) -> None:
  """Raises KeyboardInterrupt, or ends the process in the midst of an import."""
  del number
  while frame is not None:
    if frame.f_code.co_filename == _IMPORTER:
      os.write(2, f"error: {MESSAGE}\n".encode())
      os._exit(CODE)
    frame = frame.f_back
  raise KeyboardInterrupt
