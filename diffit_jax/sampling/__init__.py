"""From noise to samples: `sample`, one file per solver, one loop."""

from collections.abc import Callable
import inspect

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.sampling import ddim, ddpm, dpmpp_2m, edm_heun, loop, unipc

__all__ = ["SOLVERS", "levels", "num_evaluations", "num_skipped", "sample"]

SOLVERS: dict[str, Callable[..., loop.Solver]] = {
  "edm_heun": edm_heun.make_solver,
  "ddpm": ddpm.make_solver,
  "ddim": ddim.make_solver,
  "dpmpp_2m": dpmpp_2m.make_solver,
  "unipc": unipc.make_solver,
}


def sample(
  denoiser: loop.Denoiser,
  solver: str,
  noise: jax.Array,
  *,
  steps: int,
  keys: jax.Array | None = None,
  step_noise: jax.Array | None = None,
  plain: loop.Denoiser | None = None,
  skip: loop.Skip | None = None,
  **solver_options,
) -> jax.Array:
  """Turns noise into samples.

  Everything but `solver`, `steps` and the options may be traced: call it under
  `jax.jit`, with a denoiser that closes over the jitted function's params.

  Args:
    denoiser: guidance already applied; for "edm_heun" (x [b, h, w, c],
      sigma [b]) -> D [b, h, w, c], the expected clean images; for the others,
      which sample ADM's diffusion, (x [b, h, w, c], t [b]) -> [b, h, w, 2c] eps
      and v, or [b, h, w, c] eps alone. t is the original step 0..999, int32; a
      float in the dtype of `noise` if spacing="logsnr_exact".
    solver: one of `SOLVERS`.
    noise: [b, h, w, c] unit normal; its dtype, float32 or float64, is that of
      the computation.
    steps: steps of the solver, > 0.
    keys: [b] typed PRNG keys, one per sample, needed where the solver draws
      noise. Draw k of a sample is normal(fold_in(its key, k)), so it depends on
      nothing else in the batch. Take `noise` from another stream.
    step_noise: [draws, b, h, w, c] to use in place of the keys, in call order:
      `steps` draws for "edm_heun" with churn, "ddpm", and "ddim" with eta > 0,
      of which the last is drawn and multiplied by 0 in the latter two.
      Deterministic runs read neither.
    plain: the denoiser without guidance, for where `skip` says so.
    skip: noise levels [n] of the evaluations, on the host -> bool [n],
      such as `guidance.skippable`; see `num_skipped`.
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
    plain=plain,
    skip=skip,
  )


def num_evaluations(solver: str, steps: int, **solver_options) -> int:
  """How often a run calls the denoiser."""
  return _make(solver, steps, solver_options).num_evaluations


def levels(solver: str, steps: int, **solver_options) -> np.ndarray:
  """[num_evaluations] numpy: what the denoiser is told, in call order."""
  return _make(solver, steps, solver_options).levels.copy()


def num_skipped(
  solver: str, steps: int, skip: loop.Skip, **solver_options
) -> int:
  """How many of a run's evaluations the plain denoiser makes."""
  made = _make(solver, steps, solver_options)
  return sum(
    stop - start
    for start, stop, is_skipped in loop.stretches(made, skip)
    if is_skipped
  )


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
