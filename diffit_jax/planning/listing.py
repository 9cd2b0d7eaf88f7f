"""What `main --list` prints: the paper's experiments, and what each costs.

Parameters and multiply-accumulates are counted from the traced network. The
chip-hours are an estimate by one formula, at an assumed utilisation: a step is
three forward passes, and a multiply-accumulate two operations,

  hours = 3 x 2 x MACs x images per step x steps / (peak x utilisation x 3600)
"""

from collections.abc import Iterable
import functools
import json

import jax
from ml_collections import config_dict

from diffit_jax import config_files
from diffit_jax.models import make_model
from diffit_jax.training import program

# CHOICE: a chip that many have, and the share of its bfloat16 peak that large
# transformers reach on it; image-space networks will reach less.
CHIP, PEAK, UTILISATION = "v5e", 197e12, 0.4


def table(experiments: Iterable[tuple], sweeps: Iterable[tuple] = ()) -> str:
  """Markdown: a row per experiment, then the sweeps over samplers.

  Args:
    experiments: rows of `configs.experiments.EXPERIMENTS`.
    sweeps: rows of `configs.experiments.SWEEPS`.
  """
  columns = (
    "item",
    "what",
    "paper",
    "ours",
    "--config=configs/",
    "parameters (M)",
    "GMAC/image",
    "batch",
    "steps",
    f"{CHIP} chip-hours",
  )
  rows = [columns, ("---",) * len(columns)]
  rows += [
    (item, what, paper, "not yet run", name, *_costs(name))
    for item, what, paper, name in experiments
  ]
  lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
  lines += [
    "",
    f"chip-hours: estimated, {UTILISATION:.0%} of {CHIP}'s {PEAK / 1e12:.0f}"
    " TFLOP/s, three forward passes a step; six times as many in float32"
    " (precision=paper, the image configs' default); GMAC of one forward pass,"
    " attention included",
  ]
  for item, what, paper, name, flags in sweeps:
    lines.append(
      f"{item}, {what} (paper: {paper}; ours: not yet run): evaluate the run of"
      f" {name} with {flags}"
    )
  return "\n".join(lines)


def load(name: str) -> config_dict.ConfigDict:
  """The config of "cifar10.py:window=2"."""
  file, _, arg = name.partition(":")
  return config_files.ours(file.removesuffix(".py")).get_config(arg or None)


def _costs(name: str) -> tuple[str, ...]:
  config = load(name)
  network = config.model.to_json_best_effort(sort_keys=True)
  num_params, macs = count(network, config.data.resolution)
  work = 6 * macs * config.batch_size * config.total_steps
  hours = work / (PEAK * UTILISATION * 3600)
  return (
    f"{num_params / 1e6:.1f}",
    f"{macs / 1e9:.1f}",
    str(config.batch_size),
    f"{config.total_steps:,}",
    f"{float(f'{hours:.2g}'):,.0f}",
  )


@functools.cache
def count(network: str, side: int) -> tuple[int, int]:
  """(parameters, multiply-accumulates of one forward pass of one image).

  Args:
    network: `config.model` as JSON.
    side: side of the image or latent.
  """
  model = make_model(json.loads(network))
  shapes = jax.eval_shape(lambda: program.init_params(model, side, 0))
  num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return num_params, program.forward_macs(model, shapes, side).total
