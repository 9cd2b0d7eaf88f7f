"""A hanging step ends the program; a slow one, or a long phase, does not."""

import faulthandler
import subprocess
import sys
import time

import pytest

from commands import ROOT
from diffit_jax.training.watchdog import Watchdog
from slow import slow

PROGRAM = """
import threading, time
from diffit_jax.training.watchdog import Watchdog

def a_step_that_hangs():
  {hang}

with Watchdog({seconds}) as watchdog:
  for _ in range(3):
    watchdog.step_done()
  with watchdog.patient():
    time.sleep(1)  # more than the limit
  print("patient", flush=True)
  a_step_that_hangs()
print("done")
"""


def run(hang: str, seconds: float = 0.5):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM.format(hang=hang, seconds=seconds)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


# The second waits in C for another thread, and holds no Python lock.
@pytest.mark.parametrize(
  "hang", [slow("time.sleep(50)"), "threading.Event().wait(50)"]
)
def test_a_hanging_step_ends_the_program_and_shows_where_it_is(hang):
  start = time.monotonic()
  done = run(hang)
  assert time.monotonic() - start < 30
  assert done.returncode == 1 and done.stdout == "patient\n"
  assert "Timeout" in done.stderr and "a_step_that_hangs" in done.stderr


@pytest.mark.slow
def test_a_slow_step_is_no_hang_and_0_is_off():
  assert run("time.sleep(0.1)").returncode == 0
  assert run("time.sleep(1)", seconds=0).returncode == 0


@pytest.fixture()
def timers(monkeypatch):
  """The seconds of every timer that was set; 0 where it was taken away."""
  seen = []
  monkeypatch.setattr(
    faulthandler,
    "dump_traceback_later",
    lambda seconds, exit, file: seen.append(seconds),
  )
  monkeypatch.setattr(
    faulthandler, "cancel_dump_traceback_later", lambda: seen.append(0)
  )
  return seen


def test_the_limit_follows_the_longest_recent_step(timers, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  with Watchdog(60) as watchdog:
    for seconds in (500, 1, 30, 2):  # the first of them compiles
      now[0] += seconds
      watchdog.step_done()
    with watchdog.patient():
      now[0] += 1000  # a grid of samples is no step
    now[0] += 1
    watchdog.step_done()
    for _ in range(200):
      watchdog.step_done()
  # 4 x 60 to compile; ten times 1 s is less than 60; 30 s are soon forgotten.
  assert timers[:7] == [240, 60, 60, 300, 300, 1200, 300]
  assert timers[-2:] == [60, 0]
