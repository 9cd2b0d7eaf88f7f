"""A server of the page in a process of its own, and a browser beside it."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from commands import FAST_COMPILE, ROOT

# The first that is there: without a window it takes three fifths of the CPU.
BROWSERS = ("/usr/bin/chromium-headless-shell", "/usr/bin/chromium")
CHROMIUM = next(filter(os.path.exists, BROWSERS), BROWSERS[0])
# No service of the browser's maker is asked, and root needs no sandbox.
FLAGS = (
  "--no-sandbox --disable-gpu --disable-quic --no-first-run"
  " --disable-background-networking --disable-component-update --disable-sync"
).split()
AUDIT = pathlib.Path(__file__).parent / "audit"
_PAGE = re.compile(r"^page: (http://\S+)$", re.M)


class Server:
  """`python -m diffit_jax.explore`, watched for addresses that it asks for."""

  def __init__(self, arguments: str, log: pathlib.Path, **env):
    self.log, self.audit = log, log.with_suffix(".audit")
    self.audit.touch()
    with log.open("w") as file:
      self.process = subprocess.Popen(
        [sys.executable, "-m", "diffit_jax.explore", *arguments.split()],
        cwd=ROOT,
        env={
          **os.environ,
          "AUDIT_LOG": str(self.audit),
          "JAX_PLATFORMS": "cpu",
          "PYTHONPATH": str(AUDIT),
          "XLA_FLAGS": FAST_COMPILE,
          **env,
        },
        stdout=file,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
      )

  @property
  def address(self) -> str:
    """Where the page is, once it is served."""
    end = time.monotonic() + 60
    while time.monotonic() < end and self.process.poll() is None:
      if found := _PAGE.search(self.said()):
        return found[1]
      time.sleep(0.1)
    raise AssertionError(f"no page: {self.said()}")

  def said(self) -> str:
    return self.log.read_text()

  def stop(self, number: int = signal.SIGTERM) -> None:
    """Ends it by a signal: it goes at once, and has told of nothing else."""
    self.process.send_signal(number)
    assert self.process.wait(timeout=5) == 0
    assert re.fullmatch(r"page: \S+\n", self.said())

  def __enter__(self) -> "Server":
    return self

  def __exit__(self, *_) -> None:
    """Ends it; it has asked for no address beyond this machine."""
    if self.process.poll() is None:
      self.stop()
    assert self.audit.read_text() == ""
