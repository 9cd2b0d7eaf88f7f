"""Parameters and multiply-accumulates of the latent networks (Table 9).

  python -m benchmarks.table9 [--json=FILE]

Counted in three ways: by formula; from the traced network (matrix products
only, as papers count); and by the compiler in the program that it made, half of
its FLOPs, which has everything that is elementwise as well. The compiled count
is of one and of two blocks and their difference times the depth, as all blocks
are the same. "Bare" leaves out the products of queries, keys and values.
"""

from absl import app
import jax
import jax.numpy as jnp

from benchmarks import report
from diffit_jax.models import latent
from diffit_jax.models.baselines.dit import DiT
from diffit_jax.training import cost, program

# name, network, the paper's parameters (M) and "FLOPs" (G).
ROWS = (
  ("DiffiT-XL/2, 256 px", latent.LatentDiffiT(), 561, 114),
  ("DiffiT-XL/2, 256 px, 30 blocks", latent.LatentDiffiT(depth=30), None, None),
  ("DiT-XL/2, 256 px", DiT(), 675, 119),
  ("DiffiT-XL/2, 512 px", latent.LatentDiffiT(input_size=64), None, None),
  ("DiT-XL/2, 512 px", DiT(input_size=64), None, None),
)


def arguments(model):
  """Abstract parameters, one latent and its timestep."""
  side = model.input_size
  params = jax.eval_shape(lambda: program.init_params(model, side, 0))
  x = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
  return params, x, jax.ShapeDtypeStruct((1,), jnp.float32)


def compiled_macs(model) -> float:
  """Half the compiler's FLOPs of a forward pass."""

  def of_depth(depth: int) -> float:
    short = model.clone(depth=depth, scan_blocks=False)
    run = lambda params, x, t: short.apply({"params": params}, x, t)
    compiled = jax.jit(run).lower(*arguments(short)).compile()
    return compiled.cost_analysis()["flops"] / 2

  one, two = of_depth(1), of_depth(2)
  return one + (model.depth - 1) * (two - one)


def row(name, model, paper_params, paper_macs) -> dict:
  params, *_ = arguments(model)
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  counted: cost.Macs = program.forward_macs(model, params, model.input_size)
  formula = None
  if not isinstance(model, DiT):
    formula = latent.macs(model)["with_attention"] / 1e9
  positions = model.grid**2 * model.hidden_dim
  return {
    "network": name,
    "trained": num_params,
    "and positions": num_params + positions,
    "paper (M)": paper_params,
    "bare GMAC": round(counted.without_attention / 1e9, 3),
    "all GMAC": round(counted.total / 1e9, 3),
    "by formula": None if formula is None else round(formula, 3),
    "compiled": round(compiled_macs(model) / 1e9, 3),
    "paper (G)": paper_macs,
  }


def main(_) -> None:
  table = report.Table(
    "Parameters and multiply-accumulates of one forward pass of one latent",
    [row(*each) for each in ROWS],
    [
      "The paper counts DiffiT without the attention's products (bare) and DiT"
      " with them (all): like for like, the two cost the same."
    ],
  )
  report.emit([table])


if __name__ == "__main__":
  app.run(main)
