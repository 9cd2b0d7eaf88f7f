"""kill -9 between and during saves; the run ends with the same bits."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from commands import FAST_COMPILE, PYTHON_PATH, ROOT, start_python
from configs import digits
from diffit_jax.run import checkpoint
from diffit_jax.training import program as program_lib
from training import long_run

ENVIRONMENT = {
  **os.environ,
  "XLA_FLAGS": FAST_COMPILE,
  "PYTHONPATH": PYTHON_PATH,
}
DRIVER = pathlib.Path(__file__).with_name("killed_run.py")


def start(workdir, data_dir, mode="none", at=0) -> int:
  command = [str(DRIVER), str(workdir), data_dir, mode, str(at)]
  process = start_python(command)
  _, err = process.communicate(timeout=300)
  assert process.returncode in (0, -9), err[-3000:]
  return process.returncode


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
  assert start(killed, data_dir) == 0
  a, b = final_state(tmp_path / "a"), final_state(killed)
  assert int(a.step) == int(b.step) == 6
  jax.tree.map(np.testing.assert_array_equal, a, b)
  leftovers = [p.name for p in (killed / "checkpoints").iterdir()]
  assert sorted(leftovers) == ["2", "4", "6"]


class LongRun:
  """Starts of `long_run.py` in one workdir."""

  def __init__(self, folder: pathlib.Path, data_dir: str):
    self.workdir, self._phase = folder / "run", folder / "phase"
    folder.mkdir()
    self._command = [
      *(sys.executable, str(DRIVER.with_name("long_run.py"))),
      *(str(self.workdir), data_dir, str(self._phase)),
    ]
    self._log = (folder / "log").open("w")

  def start(self) -> subprocess.Popen:
    self._phase.write_text("start")
    return subprocess.Popen(
      self._command,
      cwd=ROOT,
      env=ENVIRONMENT,
      stdout=self._log,
      stderr=self._log,
    )

  def phase(self) -> str:
    """What the process does, a save in the background coming first."""
    if list(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
      return "save"
    return self._phase.read_text().strip()

  def saved(self) -> list[int]:
    return checkpoint.list_steps(self.workdir)

  def kill_in(self, phase: str, delay: float, progress: bool) -> str | None:
    """Starts it, kills it so long after a phase began; says in which it was.

    None where the run came to its end before.

    Args:
      phase: "step", "save" or "sample".
      delay: seconds.
      progress: wait for a new checkpoint before that.
    """
    before = self.saved()
    process = self.start()
    wait = lambda condition: _wait(process, condition)
    # Once it steps, the leftovers of the last kill are cleared.
    wait(lambda: self._phase.read_text()[:5] != "start")
    wait(lambda: not progress or self.saved()[-1:] > before[-1:])
    wait(lambda: self.phase() == phase)
    time.sleep(delay)
    process.send_signal(signal.SIGSTOP)  # so that it is still what we see
    found = self.phase()
    process.kill()
    return found if process.wait() == -signal.SIGKILL else None


def _wait(process: subprocess.Popen, condition) -> None:
  while process.poll() is None and not condition():
    time.sleep(0.001)


@pytest.mark.slow
def test_twenty_random_kills_change_no_bit(data_dir, tmp_path):
  """In steps, saves and sampling; every file of the run is the same."""
  alone = LongRun(tmp_path / "a", data_dir)
  assert alone.start().wait() == 0
  killed = LongRun(tmp_path / "b", data_dir)
  rng = random.Random(0)
  phases = ["step", "save", "sample"] * 6 + ["save", "step"]
  rng.shuffle(phases)
  found = []
  for phase in phases:
    delay, progress = rng.uniform(0, 0.4), rng.random() < 0.7
    found.append(killed.kill_in(phase, delay, progress))
    print(f"killed in {found[-1]}, saved", killed.saved())
  assert None not in found and len(found) == 20
  assert min(found.count(p) for p in ("step", "save", "sample")) >= 2, found
  assert killed.start().wait() == 0

  program = program_lib.build(long_run.make_config(), jax.devices()[:1])
  ends = []
  for run in (alone, killed):
    checkpoints = checkpoint.Checkpoints(run.workdir)
    ends.append(checkpoints.restore(program.abstract))
    checkpoints.close()
    assert not (run.workdir / "damaged").exists()
  assert int(ends[0].step) == long_run.TOTAL
  jax.tree.map(np.testing.assert_array_equal, *ends)
  content = lambda run, pattern: {
    str(path.relative_to(run.workdir)): path.read_bytes()
    for path in run.workdir.glob(pattern)
  }
  for pattern, num in (
    ("samples/*.png", 3 * long_run.TOTAL // long_run.SAMPLE),
    ("snapshots/*/checksums/metadata", long_run.TOTAL // long_run.SNAPSHOT),
  ):
    assert content(alone, pattern) == content(killed, pattern)
    assert len(content(alone, pattern)) == num
