"""Ancestral sampling, for the learned range of variances or a fixed one.

Ho et al. 2020 (arXiv 2006.11239), Algorithm 2, with Nichol and Dhariwal 2021
(arXiv 2102.09672), equation (15). From x = z, for steps k = n-1 .. 0 of a
schedule (diffusion/adm.py, whose abar, beta, c1, c2 these are):

  x_0  = x / sqrt(abar_k) - sqrt(1/abar_k - 1) eps                   (1)
  mean = c1_k x_0 + c2_k x                                           (2)
  ln sigma^2 = f ln beta_k + (1 - f) ln variance_k,  f = (v + 1)/2   (3)
  x    = mean + sigma z,  without noise at k = 0                     (4)

(3) is for networks that give v; for others sigma^2 is variance_k, that of the
posterior ("fixed_small"), or beta_k ("fixed_large").
"""

import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion import adm
from diffit_jax.errors import UserError
from diffit_jax.sampling import discrete
from diffit_jax.sampling.scan import Solver

FIXED_F = {"fixed_small": 0.0, "fixed_large": 1.0}


def make_solver(
  steps: int,
  *,
  spacing: str = "uniform",
  variance: str = "fixed_small",
  clip_denoised: bool = False,
  num_train_steps: int = 1000,
) -> Solver:
  """(1)-(4) for a denoiser (x, t [b]) -> eps and v, or eps.

  Args:
    steps: n, at most num_train_steps.
    spacing: which steps, of `spacing.SPACINGS`.
    variance: "fixed_small" or "fixed_large", used where there is no v.
    clip_denoised: whether x_0 is clipped to [-1, 1]; not for latents.
    num_train_steps: T of the schedule the network was trained on.
  """
  if variance not in FIXED_F:
    raise UserError(f"{variance=} is unknown; allowed: {', '.join(FIXED_F)}")
  s = discrete.descending(steps, spacing, num_train_steps)
  rows = dict(
    c1=s.c1,
    c2=s.c2,
    log_beta=s.log_betas,
    log_variance=s.posterior_log_variance,
    is_noisy=np.arange(steps) < steps - 1,
    draw=np.arange(steps),
  )

  def update(x, row, predicted, z):
    x0, _, v = predicted  # (1)
    x0 = jnp.clip(x0, -1, 1) if clip_denoised else x0
    mean = row["c1"] * x0 + row["c2"] * x  # (2)
    v = 2 * FIXED_F[variance] - 1 if v is None else v
    log_variance = adm.interpolate_log_variance(
      v, row["log_beta"], row["log_variance"]
    )  # (3)
    noise = jnp.exp(log_variance / 2) * z
    return mean + jnp.where(row["is_noisy"], noise, 0)  # (4)

  return discrete.make_solver(s, rows, update, num_draws=steps)
