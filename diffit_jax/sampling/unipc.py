"""UniPC: a multistep predictor, and a corrector that costs no evaluation.

Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 to 8, in their form that
predicts clean data; alpha, sigma, lambda, h and (1) as in dpmpp_2m.py. On the
step from level i to i+1 put u = (lambda - lambda_i) / h, so that (1) there is

  x_{i+1} = sigma_{i+1}/sigma_i x_i
            + alpha_{i+1} h int_0^1 e^{(u-1) h} x_0(u) du.           (1)

Let D_i be x_0 predicted at level i and D_(m) the predictions at q other levels,
at u = r_m. With factors a_m to be found, take

  x_{i+1} = sigma_{i+1}/sigma_i x_i + alpha_{i+1} (1 - e^-h) D_i
            + alpha_{i+1} B sum_m a_m (D_(m) - D_i) / r_m.           (2)

Taylor's series of x_0(u) at u = 0, put into (1) and (2), agree in their terms
of order k = 1 .. q in u if

  B sum_m r_m^{k-1} a_m = h int_0^1 e^{(u-1) h} u^k du.              (3)

B(h) = 1 - e^-h ("bh2") or h ("bh1") matters only for q = 1, where the paper
takes a_1 = 1/2, the limit of (3) at h -> 0, in place of its solution.

  Predictor of order p: the q = p - 1 predictions before D_i, r_m < 0.
  Corrector of order p: those and D_{i+1}, taken at the predicted x_{i+1},
    r = 1: q = p. It replaces x_{i+1} once D_{i+1} is known, which the next
    step needs anyway; the prediction is not made again.               (4)

Thus one evaluation per step, and an error that shrinks by one order more than
the predictor's. The order is p as far as there are predictions, and falls
again to 1 on the last step, which goes to clean data, where (2) is x = D_i and
there is nothing to correct. A prediction at pure noise, where lambda is minus
infinity (flow matching begins there), is infinitely far in u: it is of no use
to later steps, and its own step is of order 1, uncorrected. With p = 2,
B = 1 - e^-h and no corrector this is DPM-Solver++(2M), whose choice of steps it
shares.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import sampling
from diffit_jax.errors import UserError
from diffit_jax.sampling.scan import Solver

VARIANTS = {"bh1": lambda h: h, "bh2": lambda h: -np.expm1(-h)}


class Carry(NamedTuple):
  """x: predicted. x_before: corrected, one level up. D: newest first."""

  x: jax.Array
  x_before: jax.Array
  D: tuple[jax.Array, ...]


def make_solver(
  steps: int,
  *,
  order: int = 2,
  variant: str = "bh2",
  corrector: bool = True,
  process: str = "adm",
  **options,
) -> Solver:
  """(2)-(4) for a denoiser (x, t [b]) -> what the process makes D of.

  Args:
    steps: n, one evaluation each.
    order: p, 1 to 3.
    variant: "bh1" or "bh2".
    corrector: False leaves out (4).
    process: "adm" or "flow".
    **options: of the process's `levels`: where the steps are.
  """
  if order not in (1, 2, 3):
    raise UserError(f"{order=} must be 1, 2 or 3")
  if variant not in VARIANTS:
    raise UserError(f"{variant=} is unknown; allowed: {', '.join(VARIANTS)}")
  levels = sampling.levels(process, steps, **options)
  predict, correct = _rows(levels, steps, order, VARIANTS[variant])

  def update(carry, row, predicted, z):
    del z
    known = (predicted[0], *carry.D)
    x = carry.x
    if corrector:
      x = _combine(row["correct"], carry.x_before, known)
    return Carry(x=_combine(row["predict"], x, known), x_before=x, D=known[:-1])

  return levels.make_solver(
    dict(predict=predict, correct=correct),
    update,
    start=lambda noise: Carry(
      x=noise, x_before=noise, D=(jnp.zeros_like(noise),) * order
    ),
    x_of=lambda carry: carry.x,
  )


def _rows(levels, steps: int, order: int, B) -> tuple[np.ndarray, np.ndarray]:
  """Weights of x and of D_i, D_{i-1}, .., as far as there are any."""
  weights = functools.partial(_weights, levels, B)
  first = 0 if levels.alpha[0] else 1  # where lambda is finite
  predict = np.zeros((steps, order + 2))
  correct = np.zeros((steps, order + 2))
  correct[0, 0] = predict[-1, 1] = 1
  for i in range(steps - 1):
    p = min(order, i + 1, steps - i)
    before = [i - m for m in range(1, p) if i - m >= first]
    plain = weights(i, before)
    predict[i, : len(plain)] = plain
    if i < first:
      x, D = plain
      correct[i + 1, :3] = x, 0, D
      continue
    x, D, *others, D_next = weights(i, [*before, i + 1])
    correct[i + 1, : len(before) + 3] = x, D_next, D, *others
  return predict, correct


def _weights(levels, B, i: int, others: list[int]) -> np.ndarray:
  """(2) from level i to i+1: of x_i, D_i, and D at the levels `others`."""
  alpha, sigma = levels.alpha, levels.sigma
  h = levels.half_log_snr(i + 1) - levels.half_log_snr(i)
  if not others:
    return np.array([sigma[i + 1] / sigma[i], -alpha[i + 1] * np.expm1(-h)])
  at = levels.half_log_snr(np.array(others, int))
  r = (at - levels.half_log_snr(i)) / h
  a = np.full(1, 0.5)
  if len(r) != 1:  # (3), with the integrals by Gauss's rule: exact to rounding
    k = np.arange(1, len(r) + 1)[:, None]
    u, du = np.polynomial.legendre.leggauss(32)
    u, du = (u + 1) / 2, du / 2
    moments = (du * np.exp((u - 1) * h) * u**k).sum(axis=1)
    a = np.linalg.solve(r ** (k - 1), h * moments / B(h))
  D_others = alpha[i + 1] * B(h) * a / r
  D_i = -alpha[i + 1] * np.expm1(-h) - D_others.sum()
  return np.array([sigma[i + 1] / sigma[i], D_i, *D_others])


def _combine(weights, x, known):
  return weights[0] * x + sum(w * D for w, D in zip(weights[1:], known))
