"""What metrics are computed from: statistics of the features of two sets."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from diffit_jax.evaluation.metrics.logit_score import InceptionScore
from diffit_jax.evaluation.metrics.moments import Gaussian, Moments

_PARTS = {"pool": Moments, "spatial": Moments, "score": InceptionScore}


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
  """What samples are compared with; None for what is not known.

  Attributes:
    pool: mean and covariance of the pool features.
    spatial: mean and covariance of Inception's spatial features.
    rows: [m, d] pool features of single images.
    missing: {what a metric needs, as in `table`: why the reference lacks it}.
    labels: [m] classes of the rows.
  """

  pool: Gaussian | None
  spatial: Gaussian | None
  rows: np.ndarray | None
  missing: Mapping[str, str]
  labels: np.ndarray | None = None


class FeatureStatistics:
  """Statistics of the features of a set of images, added batch by batch.

  Attributes:
    num: number of images so far.
    pool: moments of the pool features.
    spatial: moments of Inception's spatial features, or None.
    score: sums of the inception score, or None.
  """

  def __init__(self, held: np.ndarray | None = None):
    """`held`: sorted indices of images whose features are kept; None is all."""
    self.num = 0
    self.pool = self.spatial = self.score = None
    self._held = held
    self._rows: list[np.ndarray] = []

  def update(self, features: Mapping[str, np.ndarray]) -> None:
    """Adds the next images, in order.

    Args:
      features: {"pool": [k, d]}, from Inception also "logits" and "spatial".
    """
    pool = features["pool"]
    if not self.num:
      self.pool = Moments(pool.shape[1])
      if "spatial" in features:
        self.spatial = Moments(features["spatial"].shape[1])
      self.score = InceptionScore() if "logits" in features else None
    self.pool.update(pool)
    if self.spatial is not None:
      self.spatial.update(features["spatial"])
    if self.score is not None:
      self.score.update(features["logits"])
    if self._held is not None:
      start, end = np.searchsorted(self._held, [self.num, self.num + len(pool)])
      pool = pool[self._held[start:end] - self.num]
    self._rows.append(pool)
    self.num += len(features["pool"])

  def rows(self) -> np.ndarray:
    """[m, d] float32 pool features of the images that are kept, in order."""
    if len(self._rows) > 1:
      self._rows = [np.concatenate(self._rows)]
    return self._rows[0]

  def as_reference(self, labels: np.ndarray | None) -> ReferenceStatistics:
    """These statistics as what samples are compared with."""
    spatial = None if self.spatial is None else self.spatial.gaussian()
    return ReferenceStatistics(
      self.pool.gaussian(), spatial, self.rows(), {}, labels
    )

  def state(self) -> dict[str, np.ndarray]:
    """All of it but `held`, as plain arrays."""
    if not self.num:
      return {"num": np.int64(0)}
    found = {"num": np.int64(self.num), "rows": self.rows()}
    for name in _PARTS:
      part = getattr(self, name)
      if part is not None:
        found |= {f"{name}/{key}": x for key, x in part.state().items()}
    return found

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Continues from a `state`, to the same bits."""
    self.num = int(state["num"])
    if not self.num:
      return
    self._rows = [state["rows"]]
    for name, kind in _PARTS.items():
      start = f"{name}/"
      part = {k[len(start) :]: state[k] for k in state if k.startswith(start)}
      if part:
        setattr(self, name, kind.from_state(part))
