"""What the metrics need to know of a set of images, gathered batch by batch."""

from collections.abc import Mapping

import numpy as np

from diffit_jax.evaluation.metrics.logit_score import InceptionScore
from diffit_jax.evaluation.metrics.moments import Moments


class Statistics:
  """Moments of all features, the score's sums, and the features of some images.

  Attributes:
    pool: moments of the features proper.
    spatial: of Inception's spatial features, or None.
    score: sums of the inception score, or None.
    num: images so far.
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
      features: {"pool": [k, d]}, of Inception also "logits" and "spatial".
    """
    pool = features["pool"]
    if self.pool is None:
      self.pool = Moments(pool.shape[1])
      if "spatial" in features:
        self.spatial = Moments(features["spatial"].shape[1])
      if "logits" in features:
        self.score = InceptionScore()
    self.pool.update(pool)
    if self.spatial is not None:
      self.spatial.update(features["spatial"])
    if self.score is not None:
      self.score.update(features["logits"])
    if self._held is not None:
      start, end = np.searchsorted(self._held, [self.num, self.num + len(pool)])
      self._rows.append(pool[self._held[start:end] - self.num])
    else:
      self._rows.append(pool)
    self.num += len(pool)

  def rows(self) -> np.ndarray:
    """[m, d] float32 features of the images that are kept, in order."""
    if len(self._rows) > 1:
      self._rows = [np.concatenate(self._rows)]
    return self._rows[0]

  def state(self) -> dict[str, np.ndarray]:
    """All of it but `held`, as plain arrays."""
    if not self.num:
      return {"num": np.int64(0)}
    found = {"num": np.int64(self.num), "rows": self.rows()}
    for name in ("pool", "spatial", "score"):
      part = getattr(self, name)
      if part is not None:
        found |= {f"{name}/{key}": x for key, x in part.state().items()}
    return found

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Goes on from a `state`, to the same bits."""
    self.num = int(state["num"])
    if not self.num:
      return
    self._rows = [state["rows"]]
    kinds = {"pool": Moments, "spatial": Moments, "score": InceptionScore}
    for name, kind in kinds.items():
      part = {
        key.removeprefix(f"{name}/"): x
        for key, x in state.items()
        if key.startswith(f"{name}/")
      }
      if part:
        setattr(self, name, kind.from_state(part))
