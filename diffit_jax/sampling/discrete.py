"""What the solvers of ADM's diffusion share: the steps' tables, and x_0.

A step k of a schedule (diffusion/adm.py), which runs from noisy to clean here,
has abar_k, and from the network's eps at x follows

  x_0 = x / sqrt(abar_k) - sqrt(1/abar_k - 1) eps.                   (1)
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from diffit_jax.diffusion import adm
from diffit_jax.diffusion.spacing import SPACINGS
from diffit_jax.errors import UserError
from diffit_jax.sampling.scan import Levels, Solver


def descending(steps: int, spacing: str, num_train_steps: int) -> adm.Schedule:
  """The schedule of a sampler, every table from noisy to clean.

  Args:
    steps: number of steps, at most num_train_steps.
    spacing: which steps, of `spacing.SPACINGS`.
    num_train_steps: T of the schedule the network was trained on.
  """
  if spacing not in SPACINGS:
    raise UserError(f"{spacing=} is unknown; allowed: {', '.join(SPACINGS)}")
  if not 1 <= steps <= num_train_steps:
    raise UserError(f"{steps=} must be from 1 to {num_train_steps}")
  s = adm.respace(num_train_steps, spacing, steps)
  names = [field.name for field in dataclasses.fields(s)]
  return adm.Schedule(**{name: getattr(s, name)[::-1] for name in names})


def levels(
  steps: int, *, spacing: str = "logsnr", num_train_steps: int = 1000
) -> Levels:
  """The steps of `descending`, for solvers that see signal and noise alone."""
  s = descending(steps, spacing, num_train_steps)
  return Levels(
    np.append(s.signal, 1.0),
    np.append(s.sigma, 0.0),
    functools.partial(make_solver, s),
  )


def make_solver(
  s: adm.Schedule,
  rows: dict[str, np.ndarray],
  update: Callable[..., Any],
  *,
  start: Callable[[jax.Array], Any] = lambda noise: noise,
  x_of: Callable[[Any], jax.Array] = lambda carry: carry,
  num_draws: int = 0,
) -> Solver:
  """A solver with one evaluation per step, for a denoiser (x, t [b]) -> output.

  Args:
    s: from `descending`.
    rows: the solver's own tables, from noisy to clean.
    update: (carry, row, (x_0, eps, v), z) -> carry; x_0 is that of (1), v None
      where the network has no second half of channels.
    start: see `Solver`.
    x_of: carry -> x [b, h, w, c], where it is evaluated and what it ends with.
    num_draws: see `Solver`.
  """

  def predict(x, row, out):
    eps, v = adm.split_output(out, x.shape[-1])
    x0 = row["x_to_x0"] * x - row["eps_to_x0"] * eps  # (1)
    return x0, eps, v

  def predict_and_update(carry, row, out, z):
    return update(carry, row, predict(x_of(carry), row, out), z)

  shared = dict(t=s.timesteps, x_to_x0=s.x_to_x0, eps_to_x0=s.eps_to_x0)
  return Solver(
    rows=shared | rows,
    start=start,
    query=lambda carry, row, z: (carry, x_of(carry), row["t"]),
    update=predict_and_update,
    finish=x_of,
    num_draws=num_draws,
    level="t",
    clean=lambda x, row, out: predict(x, row, out)[0],
  )
