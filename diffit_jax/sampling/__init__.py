"""From noise to samples: `sample`, one file per solver, one loop."""

from collections.abc import Callable
import inspect

import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.sampling import edm_heun, loop

__all__ = ["SOLVERS", "num_evaluations", "sample"]

SOLVERS: dict[str, Callable[..., loop.Solver]] = {
    "edm_heun": edm_heun.make_solver,
}


def sample(
    denoiser: loop.Denoiser,
    solver: str,
    noise: jax.Array,
    *,
    steps: int,
    keys: jax.Array | None = None,
    step_noise: jax.Array | None = None,
    **solver_options,
) -> jax.Array:
  """Turns noise into samples.

  Everything but `solver`, `steps` and the options may be traced: call it under
  `jax.jit`, with a denoiser that closes over the jitted function's params.

  Args:
    denoiser: guidance already applied; for "edm_heun" (x [b, h, w, c],
      sigma [b]) -> D [b, h, w, c], the expected clean images.
    solver: one of `SOLVERS`.
    noise: [b, h, w, c] unit normal; its dtype, float32 or float64, is that of
      the computation.
    steps: steps of the solver, > 0.
    keys: [b] typed PRNG keys, one per sample, needed where the solver draws
      noise. Draw k of a sample is normal(fold_in(its key, k)), so it depends on
      nothing else in the batch. Take `noise` from another stream.
    step_noise: [draws, b, h, w, c] to use in place of the keys, in call order:
      `steps` draws for "edm_heun" with churn. Deterministic runs read neither.
    **solver_options: keyword arguments of the solver's `make_solver`.

  Returns:
    [b, h, w, c] samples in the dtype of `noise`.
  """
  noise = jnp.asarray(noise)
  if noise.ndim != 4 or not jnp.issubdtype(noise.dtype, jnp.floating):
    raise UserError(
        f"noise must be [b, h, w, c] floats, not {noise.dtype} {noise.shape}"
    )
  return loop.run(
      denoiser,
      _make(solver, steps, solver_options),
      noise,
      keys=keys,
      step_noise=step_noise,
  )


def num_evaluations(solver: str, steps: int, **solver_options) -> int:
  """How often a run calls the denoiser."""
  return _make(solver, steps, solver_options).num_evaluations


def _make(name: str, steps: int, options: dict) -> loop.Solver:
  if name not in SOLVERS:
    raise UserError(
        f"solver {name!r} is unknown; allowed: {', '.join(SOLVERS)}"
    )
  if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
    raise UserError(f"{steps=} must be a whole number above 0")
  allowed = list(inspect.signature(SOLVERS[name]).parameters)[1:]
  for option in options:
    if option not in allowed:
      raise UserError(
          f"solver {name!r} has no option {option!r}; allowed: "
          + ", ".join(allowed)
      )
  return SOLVERS[name](steps, **options)
