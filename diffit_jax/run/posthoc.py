"""An average of any width from stored ones, after the run.

Karras et al. 2024 ("Analyzing and improving the training dynamics of diffusion
models", Section 3.2): an average is the weights' trajectory times a profile
p(tau; gamma, t) (`ema`, equation 3). Snapshots i of averages with gamma_i at
step t_i are profiles p_i; the wanted profile p is approached by sum_i x_i p_i
with the least squared error over the run, which the normal equations give:

  A x = b,   A_ij = <p_i, p_j>,   b_i = <p_i, p>                           (1)

With t_a <= t_b, the inner product of two profiles over 0 < tau < t_a is

  <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1)
    * (t_a / t_b)^gamma_b / t_b                                            (2)

The same x then combine the stored averages. The update of the averages is exact
for weights that are constant between steps (`ema`, equation 6), so replacing
sums over steps by integrals costs nothing.

Nothing holds the sum of x at 1: it is 1 as nearly as the profile is reached,
which takes 10 or more snapshots over the run; `relative_error` says how nearly.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from diffit_jax.run.ema import gamma_of


@dataclasses.dataclass(frozen=True)
class Profile:
  """The profile of one average.

  Attributes:
    sigma_rel: relative width.
    step: steps taken.
  """

  sigma_rel: float
  step: int


def combine(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
  """x of (1).

  Args:
    stored: [n] profiles, none of them later than `wanted`.
    wanted: profile to approach.

  Returns:
    [n] float64; one 1 and zeros where `wanted` is among the stored.
  """
  if wanted in stored:
    return np.eye(len(stored))[list(stored).index(wanted)]
  a = _inner_products(stored, stored)
  b = _inner_products(stored, [wanted])[:, 0]
  norm = np.sqrt(a.diagonal())  # solved in profiles of norm 1
  # lstsq, as two averages may have the same width.
  return np.linalg.lstsq(a / np.outer(norm, norm), b / norm)[0] / norm


def relative_error(
  stored: Sequence[Profile], wanted: Profile, x: np.ndarray
) -> float:
  """|sum_i x_i p_i - p| / |p| over the run."""
  profiles, x = [*stored, wanted], np.append(x, -1.0)
  square = x @ _inner_products(profiles, profiles) @ x
  return float(np.sqrt(max(square, 0) / inner_product(wanted, wanted)))


def inner_product(p: Profile, q: Profile) -> float:
  """<p, q> of (2)."""
  return float(_inner_products([p], [q])[0, 0])


def _inner_products(p: Sequence[Profile], q: Sequence[Profile]) -> np.ndarray:
  """(2) of each with each, [len(p), len(q)] float64."""
  (gamma_p, t_p), (gamma_q, t_q) = _as_arrays(p), _as_arrays(q)
  gamma_p, t_p = gamma_p[:, None], t_p[:, None]
  later = np.maximum(t_p, t_q)
  gamma_later = np.where(t_p < t_q, gamma_q, gamma_p)
  scale = (gamma_p + 1) * (gamma_q + 1) / (gamma_p + gamma_q + 1)
  return scale * (np.minimum(t_p, t_q) / later) ** gamma_later / later


def _as_arrays(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
  gammas = {p.sigma_rel: gamma_of(p.sigma_rel) for p in profiles}
  return (
    np.array([gammas[p.sigma_rel] for p in profiles]),
    np.array([p.step for p in profiles], np.float64),
  )
