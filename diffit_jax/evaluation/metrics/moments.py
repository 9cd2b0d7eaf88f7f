"""Mean and covariance of features that arrive in batches, in float64.

Chan, Golub, LeVeque 1983 ("Algorithms for computing the sample variance"): with
n_a rows of mean m_a and scatter M_a = sum (x - m_a)(x - m_a)^T, and n_b more,

  d = m_b - m_a,   n = n_a + n_b,   m = m_a + d n_b / n                      (1)
  M = M_a + M_b + d d^T n_a n_b / n                                          (2)
  covariance = M / (n - 1)                                                   (3)

Every scatter is about its own mean. So a mean that is larger than the deviation
by some digits costs that many digits, and not twice as many, as in
sum x x^T - n m m^T.

Rows wait until there are `_BLOCK` of them. So the products are large, hence
fast, and the result depends on the rows alone: for any cut into batches the
same blocks are formed and the same bits come out.
"""

from collections.abc import Mapping

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics.feature_checks import check_features

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]
_BLOCK = 2048  # rows of a product; 1024 takes half as long again


class Moments:
  """Streaming mean and covariance.

  Attributes:
    dim: dimensions d of a feature.
  """

  def __init__(self, dim: int):
    if dim < 1:
      raise UserError(f"features need at least one dimension, not {dim=}")
    self.dim = dim
    self._absorbed = 0
    self._mean = np.zeros(dim)
    self._scatter = np.zeros((dim, dim))
    self._rows = np.empty((_BLOCK, dim))  # the first `_waiting` of them
    self._waiting = 0

  @property
  def num(self) -> int:
    """Rows seen."""
    return self._absorbed + self._waiting

  @property
  def mean(self) -> np.ndarray:
    """[d] float64; UserError before the first row."""
    if not self.num:
      raise UserError("no features yet: a mean needs at least one")
    rows = self._rows[: self._waiting]
    return _joined_mean(self._absorbed, self._mean, rows)

  def covariance(self) -> np.ndarray:
    """[d, d] float64 (3), exactly symmetric; UserError below two rows."""
    if self.num < 2:
      raise UserError(f"a covariance needs 2 or more features, not {self.num}")
    scatter = self._scatter.copy()
    if self._waiting:
      rows = self._rows[: self._waiting]
      _absorb(self._absorbed, self._mean, scatter, rows)
    scatter /= self.num - 1
    return scatter

  def gaussian(self) -> Gaussian:
    """The mean and the covariance."""
    return self.mean, self.covariance()

  def update(self, x) -> None:
    """Takes the rows of x, [b, d] of any float dtype, b from 0 on."""
    x = check_features(x)
    if x.shape[1] != self.dim:
      raise UserError(f"features have {x.shape[1]} dimensions, not {self.dim}")
    while len(x):
      taken = min(len(x), _BLOCK - self._waiting)
      self._rows[self._waiting : self._waiting + taken] = x[:taken]
      self._waiting += taken
      x = x[taken:]
      if self._waiting == _BLOCK:
        self._mean = _absorb(
          self._absorbed, self._mean, self._scatter, self._rows
        )
        self._absorbed += _BLOCK
        self._waiting = 0

  def state(self) -> dict[str, np.ndarray]:
    """Copies of everything it holds; `from_state` resumes to the same bits."""
    return {
      "absorbed": np.array(self._absorbed, np.int64),
      "mean": self._mean.copy(),
      "scatter": self._scatter.copy(),
      "rows": self._rows[: self._waiting].copy(),
    }

  @classmethod
  def from_state(cls, state: Mapping[str, np.ndarray]) -> "Moments":
    """The moments that had this `state`."""
    moments = cls(state["mean"].size)
    moments._absorbed = int(state["absorbed"])
    moments._mean = state["mean"].copy()
    moments._scatter = state["scatter"].copy()
    moments.update(state["rows"])
    return moments


def _joined_mean(num: int, mean: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """(1) for `num` rows of that mean and the given ones."""
  if not len(rows):
    return mean.copy()
  return mean + (_mean_of(rows) - mean) * (len(rows) / (num + len(rows)))


def _mean_of(rows: np.ndarray) -> np.ndarray:
  """[d] mean, to the last bit also where it is large beside the deviations."""
  rough = rows.mean(axis=0)
  return rough + (rows - rough).mean(axis=0)


def _absorb(
  num: int, mean: np.ndarray, scatter: np.ndarray, rows: np.ndarray
) -> np.ndarray:
  """Adds rows to `scatter` in place, by (2); returns the joined mean.

  One product does it: d sqrt(n_a n_b / n) is one more row of the factor.
  """
  mean_b = _mean_of(rows)
  weight = num * (len(rows) / (num + len(rows)))
  factor = np.empty((len(rows) + 1, rows.shape[1]))
  np.subtract(rows, mean_b, out=factor[:-1])
  factor[-1] = (mean_b - mean) * np.sqrt(weight)
  scatter += factor.T @ factor  # numpy computes one triangle and mirrors it
  return mean + (mean_b - mean) * (len(rows) / (num + len(rows)))
