"""A run of 120 slow steps on the digits, to be killed from outside.

  python long_run.py WORKDIR DATA_DIR PHASE_FILE

Saves every 3 steps, writes sample grids every 5 and snapshots of the averages
every 8. PHASE_FILE holds "start", "step" or "sample": what it is doing.
"""

import os
import sys
import time

from configs import digits
from diffit_jax.generation.generator import make_grid_sampler
from diffit_jax.training import loop, source

TOTAL, SAVE, SAMPLE, SNAPSHOT = 120, 3, 5, 8


def make_config():
  config = digits.get_config("debug,ema=power")
  config.total_steps, config.snapshot_every_steps = TOTAL, SNAPSHOT
  config.save_every_steps, config.sample_every_steps = SAVE, SAMPLE
  config.log_every_steps, config.keep_best_by = 2, "loss"
  return config


def main(workdir: str, data_dir: str, phase_file: str) -> None:
  file = os.open(phase_file, os.O_CREAT | os.O_WRONLY)
  enter = lambda phase: os.pwrite(file, f"{phase:8}".encode(), 0)
  enter("start")

  def make_batches(*args):
    for batch in source.make_batches(*args):
      enter("step")
      time.sleep(0.1)
      yield batch

  def make_sampler(*args):
    sampler = make_grid_sampler(*args)

    def sample(tree):
      enter("sample")
      images = sampler(tree)
      time.sleep(0.05)
      enter("step")
      return images

    return sample

  loop.train(
    make_config(), workdir, data_dir, make_sampler, make_batches=make_batches
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
