"""DDIM: the sampler that is deterministic at eta = 0, ancestral at eta = 1.

Song et al. 2021 (arXiv 2010.02502), equations (12) and (16). From x = z, for
steps k = n-1 .. 0 of a schedule (diffusion/adm.py; abar_{-1} = 1):

  x_0   = x / sqrt(abar_k) - sqrt(1/abar_k - 1) eps                  (1)
  sigma = eta sqrt((1 - abar_{k-1}) / (1 - abar_k)
                   (1 - abar_k / abar_{k-1}))                        (2)
  x     = sqrt(abar_{k-1}) x_0 + sqrt(1 - abar_{k-1} - sigma^2) eps
          + sigma z                                                  (3)

sigma is 0 at k = 0. At eta = 1 it is the posterior's std, and (3) the step of
ddpm.py with variance "fixed_small". If x_0 is clipped, the eps of (3) is what
(1) makes of the clipped one. A variance v in the network's output is not used.
"""

import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.sampling import discrete
from diffit_jax.sampling.scan import Solver


def make_solver(
  steps: int,
  *,
  eta: float = 0.0,
  spacing: str = "uniform",
  clip_denoised: bool = False,
  num_train_steps: int = 1000,
) -> Solver:
  """(1)-(3) for a denoiser (x, t [b]) -> eps and v, or eps.

  Args:
    steps: n, at most num_train_steps.
    eta: how much noise, >= 0; above 1 as long as the root in (3) is real.
    spacing: which steps, of `spacing.SPACINGS`.
    clip_denoised: whether x_0 is clipped to [-1, 1]; not for latents.
    num_train_steps: T of the schedule the network was trained on.
  """
  s = discrete.descending(steps, spacing, num_train_steps)
  largest = np.sqrt((1 - s.alphas_cumprod) / s.betas)[:-1].min(initial=np.inf)
  if not 0 <= eta <= max(largest, 1):
    raise UserError(
      f"{eta=} must be from 0 to {max(largest, 1):.4g} at {steps} steps"
    )
  sigma = eta * np.sqrt(s.posterior_variance)
  left = 1 - s.alphas_cumprod_prev - sigma**2
  rows = dict(
    x0=np.sqrt(s.alphas_cumprod_prev),
    eps=np.sqrt(np.maximum(left, 0)),  # rounding at the largest eta
    sigma=sigma,
    draw=np.arange(steps),
  )

  def update(x, row, predicted, z):
    x0, eps, _ = predicted  # (1)
    if clip_denoised:
      x0 = jnp.clip(x0, -1, 1)
      eps = (row["x_to_x0"] * x - x0) / row["eps_to_x0"]
    x = row["x0"] * x0 + row["eps"] * eps  # (3)
    return x if z is None else x + row["sigma"] * z

  return discrete.make_solver(s, rows, update, num_draws=steps if eta else 0)
