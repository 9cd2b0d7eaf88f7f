"""A debug run on the digits that kills itself (SIGKILL) where it is told to.

  python killed_run.py WORKDIR DATA_DIR none|step|save STEP

`step` dies after step STEP was dispatched, the one before it being saved;
`save` dies while the files of the checkpoint of STEP are being written.
"""

import os
import pathlib
import signal
import sys
import time

from configs import digits
from diffit_jax.run import checkpoint
from diffit_jax.training import loop, source
from two_processes import Notes


def die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def main(workdir: str, data_dir: str, mode: str, at: int) -> None:
  config = digits.get_config("debug")
  config.total_steps, config.save_every_steps = 6, 2
  config.log_every_steps, config.sample_every_steps = 6, 0

  def make_batches(dataset, config, first_step):
    batches = source.make_batches(dataset, config, first_step)
    for number, batch in enumerate(batches, first_step):
      if mode == "step" and number == at + 1:  # one batch is put ahead
        saved = pathlib.Path(workdir) / "checkpoints" / str(at - 1)
        while not saved.exists():  # it is saved in the background
          time.sleep(0.01)
        die()
      yield batch

  real_save = checkpoint.Checkpoints.save

  def save(self, step, *rest):
    real_save(self, step, *rest)
    if mode == "save" and step == at:
      while not list(self.directory.glob(f"{step}.orbax*/*/*")):
        if (self.directory / str(step)).exists():
          sys.exit("the save was faster than the watch")
        time.sleep(0.0005)
      die()

  checkpoint.Checkpoints.save = save
  hooks = {"make_writer": Notes, "make_batches": make_batches}
  loop.train(config, workdir, data_dir, **hooks)


if __name__ == "__main__":
  main(*sys.argv[1:4], int(sys.argv[4]))
