"""Seconds per image of the forward pass and the train step, and peak memory.

  python benchmarks/train_step.py [--configs=digits,cifar10,ffhq64] [--json=F]

Each config's real network and step, on images of noise. Every config runs in a
process of its own, so that its peak memory is its own. Turns alternate between
forward and step; medians are printed.
"""

import importlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

from absl import app, flags

_CONFIGS = flags.DEFINE_list(
  "configs", ["digits", "cifar10", "ffhq64"], "Files of configs/ to measure."
)
_BATCH = flags.DEFINE_integer("batch_size", 4, "Images per step.", 1)
_TURNS = flags.DEFINE_integer("turns", 5, "Measured turns, after one.", 1)
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")
_ONE = flags.DEFINE_string("one", None, "Used by the program itself.")


def measure(name: str, batch_size: int, turns: int) -> dict:
  """One row of the table, in this process."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from diffit_jax.training import program as program_lib
  from diffit_jax.training import state as state_lib

  config = importlib.import_module(f"configs.{name}").get_config()
  config.batch_size = batch_size
  program = program_lib.build(config)
  state = state_lib.create(program.init, program.mesh)
  monitor = state_lib.new_monitor(program.mesh)
  shapes = program_lib.batch_shapes(config)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, shapes["image"].shape, np.uint8),
    "label": np.zeros(batch_size, np.int32),
    "index": np.arange(batch_size, dtype=np.uint32),
  }
  forward = jax.jit(
    lambda params, x: program.model.apply(
      {"params": params}, x, jnp.zeros(batch_size)
    )
  )
  x = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
  times = {"forward": [], "step": []}
  for turn in range(turns + 1):
    start = time.perf_counter()
    jax.block_until_ready(forward(state.params, x))
    middle = time.perf_counter()
    state, monitor = program.train_step(state, monitor, batch)
    jax.block_until_ready((state, monitor))
    if turn:  # the first one compiles
      times["forward"].append(middle - start)
      times["step"].append(time.perf_counter() - middle)
  median = {k: statistics.median(v) / batch_size for k, v in times.items()}
  return {
    "config": name,
    "parameters": sum(a.size for a in jax.tree.leaves(state.params)),
    "forward_seconds_per_image": median["forward"],
    "step_seconds_per_image": median["step"],
    "step_over_forward": median["step"] / median["forward"],
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "machine": f"{platform.machine()}, {len(jax.devices())}"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__},"
    f" {config.model.dtype}",
  }


def main(_) -> None:
  if _ONE.value:
    print(json.dumps(measure(_ONE.value, _BATCH.value, _TURNS.value)))
    return
  rows = []
  for name in _CONFIGS.value:
    options = [f"--batch_size={_BATCH.value}", f"--turns={_TURNS.value}"]
    done = subprocess.run(
      [sys.executable, __file__, f"--one={name}", *options],
      stdout=subprocess.PIPE,
      check=True,
      text=True,
    )
    rows.append(json.loads(done.stdout.splitlines()[-1]))
  print(
    f"batch {_BATCH.value}, median of {_TURNS.value} turns,"
    f" {rows[0]['machine']}"
  )
  columns = ["config", "parameters", "forward s/image", "step s/image"]
  print(f"| {' | '.join([*columns, 'step/forward', 'peak GiB'])} |")
  print("|---|---|---|---|---|---|")
  for row in rows:
    print(
      f"| {row['config']} | {row['parameters']:,}"
      f" | {row['forward_seconds_per_image']:.4f}"
      f" | {row['step_seconds_per_image']:.4f}"
      f" | {row['step_over_forward']:.2f} | {row['peak_gib']:.2f} |"
    )
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(rows, file, indent=2)


if __name__ == "__main__":
  app.run(main)
