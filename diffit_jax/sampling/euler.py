"""Euler's method on the straight path of flow matching.

With t_i, v and D of continuous.py, a step follows dx/dt = v at its beginning:

  x_{i+1} = x_i + (t_{i+1} - t_i) v_i
          = r x_i + (1 - r) D_i,  r = t_{i+1} / t_i.                 (1)

The straight line through x_i and D_i, and so what DDIM does on any path.
"""

import numpy as np

from diffit_jax.sampling import continuous
from diffit_jax.sampling.scan import Solver


def make_solver(
  steps: int, *, shift: float = 1.0, t_max: float = 1.0
) -> Solver:
  """(1) for a denoiser (x, t [b]) -> D.

  Args:
    steps: n, one evaluation each.
    shift, t_max: see `continuous.shares_of_noise`.
  """
  t = continuous.shares_of_noise(steps, shift=shift, t_max=t_max)
  ratio: np.ndarray = t[1:] / t[:-1]

  def update(x, row, predicted, z):
    del z
    (D,) = predicted
    return row["x"] * x + row["D"] * D  # (1)

  return continuous.make_solver(t, dict(x=ratio, D=1 - ratio), update)
