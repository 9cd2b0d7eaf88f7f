"""One process of a debug run on the digits, with dropout, over several.

Tests start it, or other programs, side by side with `run_all`.

  python two_processes.py WORKDIR DATA_DIR COORDINATOR NUM_PROCESSES PROCESS_ID
      [FATE STEP]

FATE is what befalls the last process while batch STEP is put on its devices:
`term` is SIGTERM, `kill` is SIGKILL once a step is saved, `fail` an error that
no other process meets, `hang` makes it wait for ever; `kill_all` is SIGKILL to
each. Every loss and the samples of every batch go to
WORKDIR/process_<i>.jsonl.
"""

from collections.abc import Callable
import json
import os
import pathlib
import signal
import socket
import sys
import time

import jax

from commands import FAST_COMPILE, start_python
from configs import digits
from diffit_jax import cli
from diffit_jax.errors import UserError
from diffit_jax.parallel import runtime
from diffit_jax.run import checkpoint

BATCH = 16
FRIGHTENING = ("Traceback", "rror", "RNING", "Fatal")  # words of no good end
FOUR_DEVICES = f"--xla_force_host_platform_device_count=4 {FAST_COMPILE}"


def get_config():
  config = digits.get_config("debug")
  config.model.dropout = 0.2
  config.batch_size = BATCH
  config.total_steps, config.save_every_steps = 8, 4
  config.log_every_steps, config.sample_every_steps = 1, 0
  config.watchdog_seconds = 0
  return config


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def run_all(commands, timeout=300, **env) -> list[tuple[int, str, str]]:
  """Runs Python programs side by side; (exit code, stdout, stderr) of each.

  A variable of `env` that is None is taken away.
  """
  env = {"XLA_FLAGS": FOUR_DEVICES, **env}
  processes = [start_python(command, env=env) for command in commands]
  try:
    texts = [process.communicate(timeout=timeout) for process in processes]
    return [(p.returncode, *text) for p, text in zip(processes, texts)]
  finally:
    for process in processes:
      process.kill()
      process.wait()


class Notes:
  """Stands for metrics.Writer: one file of notes per process."""

  def __init__(self, directory, config):
    path = pathlib.Path(directory) / f"process_{jax.process_index()}.jsonl"
    self._file = open(path, "a", buffering=1)

  def note(self, **fields) -> None:
    self._file.write(json.dumps(fields) + "\n")

  def scalars(self, step, values) -> None:
    self.note(step=step, loss=values["loss"])

  def text(self, name, content) -> None:
    pass

  def flush(self) -> None:
    pass

  def close(self) -> None:
    pass


def train(
  workdir,
  data_dir,
  befall: Callable[[int], None] | None = None,
  config=None,
  **kwargs,
):
  """`loop.train` with notes; `befall(step)` runs before batch `step` is put."""
  from diffit_jax.training import loop, source

  notes = []

  def make_notes(*args):
    notes.append(Notes(*args))
    return notes[0]

  def make_batches(*args):
    for batch in source.make_batches(*args):
      step = int(batch["index"].min()) // BATCH
      notes[0].note(batch=step, index=batch["index"].tolist())
      if befall is not None:
        befall(step)
      yield batch

  loop.train(
    config or get_config(),
    workdir,
    data_dir,
    make_writer=make_notes,
    make_batches=make_batches,
    **kwargs,
  )


def main(workdir, data_dir, coordinator, num, process, fate="", at="-1"):
  signals = {"term": signal.SIGTERM, "kill": signal.SIGKILL}

  def befall(step: int) -> None:
    is_hit = int(process) == int(num) - 1 or fate == "kill_all"
    if step != int(at) or not is_hit:
      return
    if fate == "fail":
      raise UserError("the disk of this host is gone")
    if fate == "hang":
      time.sleep(1000)
    while fate == "kill" and not checkpoint.list_steps(workdir):
      time.sleep(0.01)  # it is saved in the background
    os.kill(os.getpid(), signals[fate.removesuffix("_all")])

  cluster = runtime.detect(coordinator, int(num), int(process), {})
  config = get_config()
  config.watchdog_seconds = 20 if fate == "hang" else 0
  with runtime.distributed(cluster, timeout=120, heartbeat_timeout=5):
    train(workdir, data_dir, befall if fate else None, config)
  return 0


if __name__ == "__main__":
  given, sys.argv = sys.argv[1:], sys.argv[:1]
  cli.run(lambda: main(*given))
