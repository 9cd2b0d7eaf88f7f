"""kill -9 between and during saves; the run ends with the same bits."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from commands import FAST_COMPILE, ROOT
from configs import digits
from diffit_jax.training import checkpoint
from diffit_jax.training import program as program_lib

DRIVER = pathlib.Path(__file__).with_name("killed_run.py")


def start(workdir, data_dir, mode="none", at=0) -> int:
  done = subprocess.run(
    [sys.executable, str(DRIVER), str(workdir), data_dir, mode, str(at)],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode in (0, -9), done.stderr[-3000:]
  return done.returncode


def final_state(workdir):
  config = digits.get_config("debug")
  program = program_lib.build(config, jax.devices()[:1])
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return checkpoints.restore(program.abstract)
  finally:
    checkpoints.close()


def test_kills_between_and_during_saves_change_no_bit(data_dir, tmp_path):
  assert start(tmp_path / "a", data_dir) == 0
  killed = tmp_path / "b"
  assert start(killed, data_dir, "save", 2) == -9
  assert checkpoint.list_steps(killed) == []
  assert start(killed, data_dir, "step", 3) == -9  # after the save of 2
  assert checkpoint.list_steps(killed) == [2]
  assert start(killed, data_dir, "save", 4) == -9
  assert checkpoint.list_steps(killed) == [2]
  assert start(killed, data_dir) == 0
  a, b = final_state(tmp_path / "a"), final_state(killed)
  assert int(a.step) == int(b.step) == 6
  jax.tree.map(np.testing.assert_array_equal, a, b)
  leftovers = [p.name for p in (killed / "checkpoints").iterdir()]
  assert sorted(leftovers) == ["2", "4", "6"]
