"""EDM's sampler: Heun's method, deterministic or with churn.

Karras et al. 2022 (arXiv 2206.00364), Algorithm 2 and Table 1. With the noise
levels of n steps

  sigma_i = (sigma_max^(1/rho)
             + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,
  sigma_n = 0,                                                       (1)

start at x = sigma_0 z and at each step raise the noise by a factor 1 + gamma,
then follow dx/dsigma = (x - D(x; sigma)) / sigma down to the next level:

  gamma  = min(S_churn / n, sqrt(2) - 1) if S_min <= sigma_i <= S_max else 0
  s      = (1 + gamma) sigma_i                                       (2)
  x_hat  = x + sqrt(s^2 - sigma_i^2) S_noise z                       (3)
  d      = (x_hat - D(x_hat; s)) / s
  x      = x_hat + (sigma_{i+1} - s) d                               (4)
  d'     = (x - D(x; sigma_{i+1})) / sigma_{i+1}
  x      = x_hat + (sigma_{i+1} - s) (d + d') / 2                    (5)

with (5) left out where sigma_{i+1} = 0: 2n - 1 evaluations. S_churn = 0 is the
deterministic sampler and draws nothing. At n = 1, which (1) leaves open, the
one step starts at sigma_max.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.sampling.scan import Solver


class Carry(NamedTuple):
  """x: the state. x_hat, d: where the step under way began, and its slope."""

  x: jax.Array
  x_hat: jax.Array
  d: jax.Array


def noise_levels(
  steps: int,
  *,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
) -> np.ndarray:
  """(1): [steps + 1] float64, falling from sigma_max to 0."""
  i = np.arange(steps) / max(steps - 1, 1)
  high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return np.append((high + i * (low - high)) ** rho, 0.0)


def make_solver(
  steps: int,
  *,
  sigma_min: float = 0.002,
  sigma_max: float = 80.0,
  rho: float = 7.0,
  S_churn: float = 0.0,
  S_min: float = 0.0,
  S_max: float = float("inf"),
  S_noise: float = 1.0,
) -> Solver:
  """Algorithm 2 for a denoiser (x, sigma [b]) -> D; see the module.

  One row per evaluation. Rows of (4) and (5) share the step's end and length;
  they differ in where they evaluate and in what they make of the slope.
  """
  if not 0 < sigma_min < sigma_max < np.inf:
    raise UserError(f"need 0 < {sigma_min=} < {sigma_max=}, finite")
  if not (0 < rho < np.inf and S_churn >= 0 and 0 <= S_noise < np.inf):
    raise UserError(
      f"need {rho=} > 0, {S_churn=} >= 0, {S_noise=} >= 0, finite"
    )
  if np.isnan(S_min) or np.isnan(S_max):
    raise UserError(f"need numbers for {S_min=} and {S_max=}")
  levels = noise_levels(
    steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho
  )
  sigma = levels[:-1]
  churned = (S_min <= sigma) & (sigma <= S_max)
  gamma = np.where(churned, min(S_churn / steps, 2**0.5 - 1), 0.0)
  raised = (1 + gamma) * sigma
  added = np.sqrt(raised**2 - sigma**2) * S_noise

  return along(levels, raised, added)


def along(levels: np.ndarray, raised: np.ndarray, added: np.ndarray) -> Solver:
  """(3)-(5) through levels at which dx/dlevel = (x - D) / level.

  Args:
    levels: [n + 1], falling to 0; unit noise times the first is the start.
    raised: [n] level s at which each step begins.
    added: [n] factor of z in (3).
  """
  steps, following = len(raised), levels[1:]
  pairs = lambda predictor, corrector: np.stack(
    np.broadcast_arrays(predictor, corrector), axis=-1
  ).reshape(-1)[:-1]  # the last step has no corrector
  step = np.arange(steps)
  rows = dict(
    sigma=pairs(raised, following),
    length=pairs(following - raised, following - raised),
    added=pairs(added, 0.0),
    is_corrector=pairs(np.zeros(steps, bool), True),
    draw=pairs(step, step),
  )
  return Solver(
    rows=rows,
    start=lambda noise: Carry(
      x=jnp.asarray(levels[0], noise.dtype) * noise,
      x_hat=jnp.zeros_like(noise),
      d=jnp.zeros_like(noise),
    ),
    query=_query,
    update=_update,
    finish=lambda carry: carry.x,
    num_draws=steps if added.any() else 0,
  )

def _query(carry, row, z):
  """(3) on the rows of (4); on those of (5) nothing is added."""
  x = carry.x if z is None else carry.x + row["added"] * z
  return carry._replace(x=x), x, row["sigma"]


def _update(carry, row, D, z):
  """(4) or (5)."""
  del z
  slope = (carry.x - D) / row["sigma"]
  d = jnp.where(row["is_corrector"], (carry.d + slope) / 2, slope)
  x_hat = jnp.where(row["is_corrector"], carry.x_hat, carry.x)
  return Carry(x=x_hat + row["length"] * d, x_hat=x_hat, d=d)
