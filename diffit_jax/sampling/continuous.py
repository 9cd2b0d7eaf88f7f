"""What the solvers of flow matching share: shares of noise, from 1 to 0.

On the path x = (1 - t) y + t n (diffusion/flow.py), n steps go through

  u_i = 1 - i/n,  t_i = t_max shift u_i / (1 + (shift - 1) u_i),     (1)

from pure noise, t_0 = 1 where t_max = 1, to clean data, t_n = 0. A denoiser
gives D at t_i, i < n, so at t = 0 it is never asked. The velocity and the noise
that D stands for,

  v = (x - D) / t,   eps = (x - (1 - t) D) / t,                      (2)

are combinations of x and D, and so is every step of every solver here: with
coefficients in float64 the last step, to t = 0, is x = D without rounding.
"""

import functools

import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion import flow
from diffit_jax.errors import UserError
from diffit_jax.sampling.scan import Levels, Solver


def shares_of_noise(
  steps: int, *, shift: float = 1.0, t_max: float = 1.0
) -> np.ndarray:
  """(1): [steps + 1] float64, falling from t_0 to 0.

  Args:
    steps: n.
    shift: above 1, more of the steps are at high noise.
    t_max: where to start, above 0 and at most 1. A network that predicts noise
      says nothing of the data at 1, and starts below.
  """
  if not 1e-3 <= shift <= 1e3:
    raise UserError(f"{shift=} must be from 0.001 to 1000")
  if not 1e-3 <= t_max <= 1:
    raise UserError(f"{t_max=} must be from 0.001 to 1")
  return t_max * flow.shifted(1 - np.arange(steps + 1) / steps, shift)


def levels(steps: int, *, shift: float = 1.0, t_max: float = 1.0) -> Levels:
  """The levels of (1), for solvers that see signal and noise alone."""
  t = shares_of_noise(steps, shift=shift, t_max=t_max)
  return Levels(1 - t, t, functools.partial(make_solver, t))


def make_solver(
  t: np.ndarray,
  rows: dict[str, np.ndarray],
  update,
  *,
  start=lambda noise: noise,
  x_of=lambda carry: carry,
  num_draws: int = 0,
) -> Solver:
  """A solver with one evaluation per step, for a denoiser (x, t [b]) -> D.

  Args:
    t: from `shares_of_noise`.
    rows: the solver's own tables, [n, ...] each.
    update: (carry, row, (D,), z) -> carry.
    start: x at t_0 [b, h, w, c] -> carry.
    x_of: carry -> x [b, h, w, c], where it is evaluated and what it ends with.
    num_draws: see `Solver`.
  """
  return Solver(
    rows=dict(t=t[:-1]) | rows,
    # CHOICE: of x at t_0 < 1 the part (1 - t_0) y is not known, and left out.
    start=lambda noise: start(jnp.asarray(t[0], noise.dtype) * noise),
    query=lambda carry, row, z: (carry, x_of(carry), row["t"]),
    update=lambda carry, row, out, z: update(carry, row, (out,), z),
    finish=x_of,
    num_draws=num_draws,
    level="t",
  )
