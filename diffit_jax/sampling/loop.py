"""The one loop that drives every solver.

A sampler spends its time in the network, so the loop counts evaluations of the
denoiser, not steps: one `lax.scan` with exactly one call in its body, which is
therefore traced and compiled once, whatever the solver. A solver is what
happens around that call: numbers made on the host in float64 and a few small
functions without a network, each evaluation being

  carry, x, level = query(carry, row, z)
  out             = denoiser(x, level)                               (1)
  carry           = update(carry, row, out, z)

Heun's method, with two evaluations per step, alternates two kinds of rows; a
multistep method keeps earlier outputs in its carry.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Solver:
  """One sampling method at a fixed number of steps.

  Attributes:
    rows: tables with one entry per evaluation, [num_evaluations, ...] each.
      Floats are made in float64 and cast to the working dtype when used. With
      noise, an integer table "draw" says which draw an evaluation sees; two
      evaluations may see the same one.
    start: unit normal noise [b, h, w, c] -> carry, any pytree.
    query: (carry, row, z) -> (carry, x [b, h, w, c], level, a scalar).
    update: (carry, row, out [b, h, w, c'], z) -> carry.
    finish: carry -> samples [b, h, w, c].
    num_draws: noise tensors that a run uses, numbered from 0. With 0 the solver
      is deterministic and z is None.
  """

  rows: dict[str, np.ndarray]
  start: Callable[[jax.Array], Any]
  query: Callable[..., tuple[Any, jax.Array, jax.Array]]
  update: Callable[..., Any]
  finish: Callable[[Any], jax.Array]
  num_draws: int = 0

  @property
  def num_evaluations(self) -> int:
    return len(next(iter(self.rows.values())))


def run(
    denoiser: Denoiser,
    solver: Solver,
    noise: jax.Array,
    *,
    keys: jax.Array | None = None,
    step_noise: jax.Array | None = None,
) -> jax.Array:
  """Runs (1) over all evaluations; arguments as in `sampling.sample`."""
  dtype = noise.dtype
  batch = noise.shape[0]
  draw = _drawer(solver, noise, keys, step_noise)
  rows = {
      name: jnp.asarray(
          table, dtype if np.issubdtype(table.dtype, np.floating) else None
      )
      for name, table in solver.rows.items()
  }

  def evaluate(carry, row):
    z = draw(row["draw"]) if solver.num_draws else None
    carry, x, level = solver.query(carry, row, z)
    out = denoiser(x, jnp.broadcast_to(level, (batch,)))
    return solver.update(carry, row, out.astype(dtype), z), None

  carry, _ = jax.lax.scan(evaluate, solver.start(noise), rows)
  return solver.finish(carry)


def _drawer(solver, noise, keys, step_noise):
  """A function from the number of a draw to its noise, [b, h, w, c]."""
  if not solver.num_draws:
    return None
  if step_noise is not None:
    expected = (solver.num_draws, *noise.shape)
    if step_noise.shape != expected:
      raise UserError(
          f"step_noise has shape {step_noise.shape}; this run draws {expected}"
      )
    return lambda number: jnp.asarray(step_noise, noise.dtype)[number]
  batch = noise.shape[0]
  if keys is None:
    raise UserError(
        "this run draws noise: give keys, one per sample, or step_noise "
        f"[{solver.num_draws}, b, h, w, c]"
    )
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (
      batch,
  ):
    raise UserError(
        f"keys must be [{batch}] typed PRNG keys (jax.random.key), one per "
        f"sample, not {keys.dtype} {keys.shape}"
    )

  def normal(key, number):
    # float32 in every working dtype, so that precision changes no draw.
    key = jax.random.fold_in(key, number)
    return jax.random.normal(key, noise.shape[1:], jnp.float32)

  return lambda number: jax.vmap(normal, (0, None))(keys, number).astype(
      noise.dtype
  )
