"""What every command shares: ^C at any time, and a terminal of any kind."""

import os
import signal
import subprocess
import sys
import types

import pytest

from commands import ROOT
from diffit_jax import cli, interrupt


class Ended(BaseException):
  """In place of the end of the process."""


def test_an_interrupt_ends_the_process_within_an_import(tmp_path, monkeypatch):
  """Raised there, it may crash an extension module, or be lost."""

  def end(code):
    raise Ended(code)

  said = []
  monkeypatch.setattr(os, "_exit", end)
  monkeypatch.setattr(os, "write", lambda file, text: said.append((file, text)))
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "long_import.py").write_text(
    "import signal\nsignal.raise_signal(signal.SIGINT)"
  )
  before = signal.signal(signal.SIGINT, interrupt.on_signal)
  try:
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    assert not said
    with pytest.raises(Ended, match="130"):
      import long_import  # noqa: F401
  finally:
    signal.signal(signal.SIGINT, before)
  assert said == [
    (2, b"error: interrupted; run the same command again to continue\n")
  ]


def test_an_output_that_is_ascii_only_is_no_error():
  code = "from diffit_jax import cli; cli.run(lambda: print('Fréchet'))"
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
  )
  assert (done.returncode, done.stdout) == (0, b"Fr\\xe9chet\n")


def test_reads_that_a_damaged_checkpoint_cut_off_say_nothing(monkeypatch):
  """Orbax's closed event loop; anything else is still told."""
  told = []
  monkeypatch.setattr(sys, "__unraisablehook__", told.append)
  late, other = (
    types.SimpleNamespace(exc_value=RuntimeError(text))
    for text in ("Event loop is closed", "another")
  )
  cli._report_unraisable(late)
  cli._report_unraisable(other)
  assert told == [other]
