"""DPM-Solver++(2M): two steps' predictions of the clean data, extrapolated.

Lu et al. 2022 (arXiv 2211.01095), Algorithm 2. With alpha = sqrt(abar),
sigma = sqrt(1 - abar) and lambda = ln(alpha / sigma), the deterministic
trajectory of the diffusion from level i to i+1, h_i = lambda_{i+1} - lambda_i,
is exactly

  x_{i+1} = sigma_{i+1}/sigma_i x_i
            + sigma_{i+1} int e^lambda x_0(lambda) dlambda           (1)

over [lambda_i, lambda_{i+1}]. With D_i = x_0 predicted at level i, replace the
integrand's x_0(lambda) by its value at the middle of the step on the line
through the last two predictions; the integral of e^lambda is known:

  D~      = D_i + h_i / (2 h_{i-1}) (D_i - D_{i-1})                  (2)
  x_{i+1} = sigma_{i+1}/sigma_i x_i + alpha_{i+1} (1 - e^-h_i) D~    (3)

The local error is of third order in h. There is no D_{-1}, so the first step
takes D~ = D_0. The last one goes to clean data, abar = 1, where h is infinite
and (3) is x = D~; it takes D~ = D_{n-1}. Flow matching (alpha = 1 - t, sigma =
t) begins at pure noise, where lambda is minus infinity: after that step h_{i-1}
is infinite, and (2) is D~ = D_i again. None of the coefficients needs lambda
there: alpha_{i+1} (1 - e^-h_i) = alpha_{i+1} - alpha_i sigma_{i+1}/sigma_i.

CHOICE: ADM's steps evenly in lambda. Evenly in t, the steps next to clean data
are so much longer in lambda than those before that (2) extrapolates far: on
mixtures of normals 10 steps then did worse than DDIM, and 20 had 9 to 26 times
the error of even lambda. "trailing", whose last step is the long one, lies
between.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import sampling
from diffit_jax.sampling.scan import Solver


class Carry(NamedTuple):
  """x: the state. D: the prediction before."""

  x: jax.Array
  D: jax.Array


def make_solver(steps: int, *, process: str = "adm", **options) -> Solver:
  """(2), (3) for a denoiser (x, t [b]) -> what the process makes D of.

  Args:
    steps: n, one evaluation each.
    process: "adm" or "flow".
    **options: of the process's `levels`: where the steps are.
  """
  levels = sampling.levels(process, steps, **options)
  alpha, sigma = levels.alpha, levels.sigma
  # h of all steps but the last.
  h = np.diff(levels.half_log_snr(np.arange(steps)))
  extrapolation = np.zeros(steps)
  extrapolation[1:-1] = h[1:] / (2 * h[:-1])
  shrink = sigma[1:] / sigma[:-1]
  rows = dict(
    extrapolation=extrapolation,
    x=shrink,
    D=alpha[1:] - shrink * alpha[:-1],  # alpha_{i+1} (1 - e^-h)
  )
  return levels.make_solver(
    rows,
    _update,
    start=lambda noise: Carry(x=noise, D=jnp.zeros_like(noise)),
    x_of=lambda carry: carry.x,
  )


def _update(carry, row, predicted, z):
  del z
  D, *_ = predicted
  extrapolated = D + row["extrapolation"] * (D - carry.D)  # (2)
  return Carry(x=row["x"] * carry.x + row["D"] * extrapolated, D=D)  # (3)
