"""Heun's method on the straight path of flow matching.

dx/dt = v = (x - D) / t has the form of EDM's dx/dsigma = (x - D) / sigma, so
this is EDM's deterministic sampler (edm_heun.py) with shares of noise t, from 1
to 0, for its noise levels: two evaluations per step, and one on the last, where
t = 0 has no slope. Second order in the steps' length, all but that last one.
"""

from diffit_jax.sampling import continuous, edm_heun
from diffit_jax.sampling.scan import Solver


def make_solver(
  steps: int, *, shift: float = 1.0, t_max: float = 1.0
) -> Solver:
  """Heun's method for a denoiser (x, t [b]) -> D.

  Args:
    steps: n; 2n - 1 evaluations.
    shift, t_max: see `continuous.shares_of_noise`.
  """
  levels = continuous.shares_of_noise(steps, shift=shift, t_max=t_max)
  return edm_heun.along(levels, raised=levels[:-1], added=0 * levels[:-1])
