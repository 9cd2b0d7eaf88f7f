"""How long the training loop stands still for checkpoints and for data.

  python -m benchmarks.checkpoint [--config=digits] [--steps=400] [--json=FILE]

Trains the full config in a folder of its own and saves every --save_every
steps. The first interval, with the step's and the checksums' compilation, is
left out. "checkpoint" is everything that saving makes the loop wait for: the
check for non-finite parameters, the checksums, the copy to the host, and the
save before it; what the background thread takes from the steps' own speed is
not in it. "data" is waiting for the next batch.
"""

import importlib
import tempfile
import time

from absl import app, flags
import jax

from benchmarks import report
from diffit_jax import cli
from diffit_jax.data import preparation
from diffit_jax.data.builders import digits
from diffit_jax.training import actions, loop, source

_CONFIG = flags.DEFINE_string("config", "digits", "File of configs/.")
_STEPS = flags.DEFINE_integer("steps", 400, "Steps to train.", 2)
_EVERY = flags.DEFINE_integer("save_every", 100, "Steps between saves.", 1)
_DATA_DIR = cli.define_path("data_dir", "Default: a new folder.")
SHORT = {"steps": 80, "every": 20}


class Clock:
  """Seconds spent in calls, from `start` on."""

  def __init__(self):
    self.seconds: dict[str, list[float]] = {}
    self.start = None

  def timed(self, name: str, call):
    """`call`, with its duration noted under `name`."""

    def wrapped(*args, **kwargs):
      begin = time.monotonic()
      try:
        return call(*args, **kwargs)
      finally:
        if self.start is not None:
          spent = time.monotonic() - begin
          self.seconds.setdefault(name, []).append(spent)

    return wrapped


def measure(name: str, steps: int, every: int, data_dir: str | None) -> dict:
  """Trains `steps` steps and saves after every `every` of them: a row."""
  config = importlib.import_module(f"configs.{name}").get_config()
  config.total_steps, config.save_every_steps = steps, every
  config.sample_every_steps = 0
  clock = Clock()
  saved = []

  real_save = actions.Actions.save

  def save(self, now):
    jax.block_until_ready(now.state)  # the steps' time, not the checkpoint's
    clock.timed("checkpoint", real_save)(self, now)
    saved.append(now.step)
    if clock.start is None:  # the first save compiled its checksums
      clock.start = time.monotonic()
      clock.first_step = now.step

  def make_batches(*args):
    batches = source.make_batches(*args)
    while True:
      yield clock.timed("data", next)(batches)

  actions.Actions.save = save
  with tempfile.TemporaryDirectory() as folder:
    if data_dir is None:
      data_dir = f"{folder}/data"
      preparation.prepare(**digits.recipe(), data_dir=data_dir)
    loop.train(config, f"{folder}/run", data_dir, make_batches=make_batches)
  total = time.monotonic() - clock.start
  timed, num_saves = steps - clock.first_step, len(saved) - 1
  save_seconds = sum(clock.seconds["checkpoint"])
  return {
    "config": name,
    "steps": timed,
    "s/step": total / timed,
    "saves": num_saves,
    "s/save": save_seconds / num_saves,
    "time for checkpoints": f"{save_seconds / total:.2%}",
    "time for data": f"{sum(clock.seconds['data']) / total:.2%}",
  }


def main(_) -> None:
  size = {"steps": _STEPS.value, "every": _EVERY.value}
  if report.SHORT.value:
    size = SHORT
  row = measure(_CONFIG.value, data_dir=_DATA_DIR.value, **size)
  title = f"Training that saves every {size['every']} steps"
  packages = (*report.PACKAGES, "orbax-checkpoint")
  report.emit([report.Table(title, [row])], packages=packages)


if __name__ == "__main__":
  app.run(main)
