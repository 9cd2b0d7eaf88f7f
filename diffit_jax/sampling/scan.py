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

Where guidance is off, its unconditional half is a waste. The noise levels are
known on the host before anything runs, so the evaluations fall into stretches
that need it and stretches that do not, and each stretch is a scan of its own
that takes up the carry of the one before: no branch within a step, and one more
body to compile per change.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
Skip = Callable[[np.ndarray], np.ndarray]


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
    level: which table of `rows` holds the level of each evaluation.
    clean: (x, row, out) -> the clean data that an output stands for.
  """

  rows: dict[str, np.ndarray]
  start: Callable[[jax.Array], Any]
  query: Callable[..., tuple[Any, jax.Array, jax.Array]]
  update: Callable[..., Any]
  finish: Callable[[Any], jax.Array]
  num_draws: int = 0
  level: str = "sigma"
  clean: Callable[..., jax.Array] = lambda x, row, out: out

  @property
  def levels(self) -> np.ndarray:
    return self.rows[self.level]

  @property
  def num_evaluations(self) -> int:
    return len(self.levels)

  def num_skipped(self, skip: Skip) -> int:
    """How many of a run's evaluations the plain denoiser makes."""
    return sum(j - i for i, j, skipped in stretches(self, skip) if skipped)


@dataclasses.dataclass(frozen=True)
class Levels:
  """The n steps of a process, as solvers see it that serve several.

  Attributes:
    alpha, sigma: [n + 1] factors of clean data and of noise in x, float64, from
      noisy to clean, where they end with 1 and 0. alpha may begin with 0.
    make_solver: (rows, update, *, start, x_of) -> Solver; update is given the
      clean data that the denoiser predicts as the first of its predictions.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  make_solver: Callable[..., Solver]

  def half_log_snr(self, i) -> np.ndarray:
    """lambda_i = ln(alpha_i / sigma_i); infinite at alpha = 0 and sigma = 0."""
    with np.errstate(divide="ignore"):
      return np.log(self.alpha[i] / self.sigma[i])


def run(
  denoiser: Denoiser,
  solver: Solver,
  noise: jax.Array,
  *,
  keys: jax.Array | None = None,
  step_noise: jax.Array | None = None,
  plain: Denoiser | None = None,
  skip: Skip | None = None,
) -> jax.Array:
  """Runs (1) over all evaluations; arguments as in `sampling.sample`."""
  noise = jnp.asarray(noise)
  if noise.ndim != 4 or not jnp.issubdtype(noise.dtype, jnp.floating):
    raise UserError(
      f"noise must be [b, h, w, c] floats, not {noise.dtype} {noise.shape}"
    )
  if (plain is None) != (skip is None):
    raise UserError("plain and skip belong together: give both or neither")
  draw = drawer(solver, noise, keys, step_noise)
  rows = _tables(solver, noise.dtype)
  carry = solver.start(noise)
  for start, stop, is_skipped in stretches(solver, skip):
    chosen = plain if is_skipped else denoiser
    carry, _ = jax.lax.scan(
      lambda carry, row, chosen=chosen: (
        _evaluate(solver, chosen, noise, draw, carry, row),
        None,
      ),
      carry,
      {name: table[start:stop] for name, table in rows.items()},
    )
  return solver.finish(carry)


def advance(
  denoiser: Denoiser,
  solver: Solver,
  like: jax.Array,
  draw: Callable | None,
  carry: Any,
  start: jax.Array,
  stop: jax.Array,
) -> Any:
  """The evaluations from `start` up to `stop` alone, which may be traced.

  A run in parts, as for somebody who watches, ends with the samples of `run`,
  to rounding.

  Args:
    denoiser: guided or plain, as `stretches` says of these evaluations.
    solver: the solver.
    like: an array of the samples' shape and dtype.
    draw: from `drawer`.
    carry: from `solver.start`, or an earlier part.
    start, stop: numbers of evaluations.
  """
  rows = _tables(solver, like.dtype)

  def body(i, carry):
    row = {name: table[i] for name, table in rows.items()}
    return _evaluate(solver, denoiser, like, draw, carry, row)

  return jax.lax.fori_loop(start, stop, body, carry)


def look(
  denoiser: Denoiser,
  solver: Solver,
  like: jax.Array,
  draw: Callable | None,
  carry: Any,
  i: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What evaluation i sees and says: (x, level [b], clean data).

  Arguments as in `advance`, with the carry that comes before evaluation i.
  """
  row = {name: table[i] for name, table in _tables(solver, like.dtype).items()}
  z = draw(row["draw"]) if solver.num_draws else None
  _, x, level = solver.query(carry, row, z)
  level = jnp.broadcast_to(level, (len(like),))
  out = denoiser(x, level).astype(like.dtype)
  return x, level, solver.clean(x, row, out)


def _tables(solver: Solver, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """The solver's rows, floats in the working dtype."""
  return {
    name: jnp.asarray(
      table, dtype if np.issubdtype(table.dtype, np.floating) else None
    )
    for name, table in solver.rows.items()
  }


def _evaluate(solver, denoiser, like, draw, carry, row):
  """(1), once."""
  z = draw(row["draw"]) if solver.num_draws else None
  carry, x, level = solver.query(carry, row, z)
  out = denoiser(x, jnp.broadcast_to(level, (len(like),)))
  return solver.update(carry, row, out.astype(like.dtype), z)


def stretches(solver: Solver, skip: Skip | None) -> list[tuple[int, int, bool]]:
  """(start, stop, is_skipped) of each run of alike evaluations, in order.

  At most the two longest runs that `skip` marks are skipped, as many as an
  interval of guidance has outsides: noise levels that churn moves to and fro
  across an end of it must not each cost a compilation.
  """
  n = solver.num_evaluations
  if skip is None:
    return [(0, n, False)]
  marked = np.asarray(skip(solver.levels))
  if marked.shape != (n,) or marked.dtype != bool:
    raise UserError(
      f"skip gave {marked.dtype} {marked.shape} for {n} levels; it must give "
      f"bool ({n},)"
    )
  runs = _runs(marked)
  longest = sorted(
    (run for run in runs if run[2]), key=lambda run: run[0] - run[1]
  )[:2]
  kept = np.zeros(n, bool)
  for start, stop, _ in longest:
    kept[start:stop] = True
  return _runs(kept)


def _runs(marked: np.ndarray) -> list[tuple[int, int, bool]]:
  ends = [0, *(np.flatnonzero(np.diff(marked)) + 1), len(marked)]
  return [(int(i), int(j), bool(marked[i])) for i, j in zip(ends, ends[1:])]


def drawer(
  solver: Solver,
  noise: jax.Array,
  keys: jax.Array | None,
  step_noise: jax.Array | None = None,
) -> Callable[[jax.Array], jax.Array] | None:
  """A function from the number of a draw to its noise, [b, h, w, c].

  None for a solver that draws nothing; arguments as in `sampling.sample`, of
  noise only shape and dtype.
  """
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
