"""The reverse stochastic equation of flow matching, by Euler and Maruyama.

Ma et al. 2024 (SiT, arXiv 2401.08740), section 2.3. On the straight path, with
t, v and eps of continuous.py and the score -eps / t, the equation

  dx = (v + g^2 eps / (2 t)) dt + g dW                               (1)

followed from t = 1 to 0 has at every t the marginals of the path, whatever its
diffusion coefficient g^2(t) >= 0. A step of length d = t_i - t_{i+1} is

  x_{i+1} = x_i - d v_i - g_i^2 d eps_i / (2 t_i) + g_i sqrt(d) z    (2)

and the last one, to clean data, is without noise and with g = 0: x = D. Near
there the noise that is left, x - (1 - t) D, shrinks by 1 - d/t - g^2 d/(2 t^2)
a step, which must not overshoot. Any g^2 has the same marginals, so

  g_i^2 is at most t_i t_{i+1} / d,                                  (3)

which of many steps "constant" alone reaches, near t = 0; on the last it is 0.
With

  "sigma"     g^2 = scale t
  "constant"  g^2 = scale
  "sin2"      g^2 = scale sin^2(pi t)

the drift g^2 / (2t) is bounded at t = 0 for the first and the third; only they
have an order. scale = 0 is Euler's method.
"""

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.sampling import continuous
from diffit_jax.sampling.scan import Solver

DIFFUSIONS = {
  "sigma": lambda t: t,
  "constant": np.ones_like,
  "sin2": lambda t: np.sin(np.pi * t) ** 2,
}


def make_solver(
  steps: int,
  *,
  diffusion: str = "sigma",
  scale: float = 1.0,
  shift: float = 1.0,
  t_max: float = 1.0,
) -> Solver:
  """(2) for a denoiser (x, t [b]) -> D.

  Args:
    steps: n, one evaluation each.
    diffusion: g^2(t), one of `DIFFUSIONS`.
    scale: factor of g^2.
    shift, t_max: see `continuous.shares_of_noise`.
  """
  if diffusion not in DIFFUSIONS:
    raise UserError(
      f"{diffusion=} is unknown; allowed: {', '.join(DIFFUSIONS)}"
    )
  if not 0 <= scale < np.inf:
    raise UserError(f"{scale=} must be at least 0, and finite")
  levels = continuous.shares_of_noise(steps, shift=shift, t_max=t_max)
  t, d = levels[:-1], -np.diff(levels)
  g2 = np.minimum(scale * DIFFUSIONS[diffusion](t), t * levels[1:] / d)  # (3)
  drift = g2 * d / (2 * t**2)  # of x - (1 - t) D, which is t eps
  rows = dict(
    x=levels[1:] / t - drift,
    D=d / t + drift * (1 - t),
    z=np.sqrt(g2 * d),
    draw=np.arange(steps),
  )

  def update(x, row, predicted, z):
    (D,) = predicted
    x = row["x"] * x + row["D"] * D
    return x if z is None else x + row["z"] * z  # (2)

  num_draws = steps if g2.any() else 0
  return continuous.make_solver(levels, rows, update, num_draws=num_draws)
