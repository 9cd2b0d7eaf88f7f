"""How fast products of matrices are by themselves, beside PyTorch's.

  python -m benchmarks.products [--turns=7] [--torch_python=PATH] [--json=FILE]

The linear maps of one block, float32 at full precision, each with the two
products of its gradient. They are nearly all of the latent network's work, and
how long they take is up to the two libraries of products: beside the ratios of
benchmarks/train_step.py, these say how much of a difference is not the model's.
"""

import functools

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, yardstick

_TURNS = flags.DEFINE_integer("turns", 7, "Measured turns, after one.", 1)
BLOCKS = {  # title: tokens, and inputs and outputs of each linear map
  "Block of imagenet256's XL/2, batch 4": (
    1024,
    {
      "qkv": (1152, 3456),
      "proj": (1152, 1152),
      "fc1": (1152, 4608),
      "fc2": (4608, 1152),
    },
  ),
  "TMSA on 64x64x128, as in ffhq64, batch 1": (
    4096,
    {"qkv": (128, 384), "proj": (128, 128)},
  ),
}
PRODUCTS = {  # of x [tokens, inputs], kernel [inputs, outputs] and gradient g
  "output": lambda x, kernel, g: x @ kernel,
  "gradient of the input": lambda x, kernel, g: g @ kernel.T,
  "gradient of the kernel": lambda x, kernel, g: x.T @ g,
}


def ours(product, tokens: int, inputs: int, outputs: int):
  """A call that computes one product and returns its seconds."""
  rng = np.random.default_rng(0)
  shapes = (tokens, inputs), (inputs, outputs), (tokens, outputs)
  operands = [jnp.asarray(rng.standard_normal(s, np.float32)) for s in shapes]

  def run(*operands):
    with jax.default_matmul_precision("highest"):
      return product(*operands)

  return functools.partial(report.seconds, jax.jit(run), *operands)


def block(title: str, torch, turns: int) -> report.Table:
  """Each product in turns, and their sum."""
  tokens, maps = BLOCKS[title]
  rows = []
  for name, (inputs, outputs) in maps.items():
    sizes = dict(tokens=tokens, inputs=inputs, outputs=outputs)
    for product, function in PRODUCTS.items():
      calls = {"ours": ours(function, **sizes)}
      if torch:
        calls["torch"] = functools.partial(
          torch, "product", product=product, **sizes
        )
      times = report.medians(report.in_turns(calls, turns))
      rows.append({"map": name, "product": product, **columns(times)})
  total = {
    name: sum(row[f"{name} ms"] for row in rows) / 1e3 for name in times
  }
  rows.append({"map": "all", "product": "", **columns(total)})
  return report.Table(f"{title}: {tokens:,} tokens", rows)


def columns(seconds: dict[str, float]) -> dict:
  mine, its = seconds["ours"], seconds.get("torch")
  return {
    "ours ms": 1e3 * mine,
    "torch ms": 1e3 * its if its else None,
    "ours / torch": mine / its if its else None,
  }


def main(_) -> None:
  turns = 5 if report.SHORT.value else _TURNS.value
  with yardstick.start() as (about, torch):
    tables = [block(title, torch, turns) for title in BLOCKS]
  report.emit(tables, [about])


if __name__ == "__main__":
  app.run(main)
