"""The inception score of classifier logits, in float64.

Salimans et al. 2016, "Improved techniques for training GANs", Section 4: with
p_i the class probabilities of image i, and q their mean over a split,

  exp mean_i sum_c p_ic (ln p_ic - ln q_c)                                   (1)
"""

from collections.abc import Mapping

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics.feature_checks import check_features

SPLIT_SIZE = 5000
_CHUNK = 1024  # rows of logits at a time: 8 MiB of float64 for 1008 classes


class InceptionScore:
  """Inception score (1) of logits that arrive in batches, in order.

  Splits are `split_size` consecutive samples; the score is the mean over them,
  in which a shorter last split has the same weight. What is kept is one number
  for each finished split, and two sums for the one that is not full yet.
  """

  def __init__(self, split_size: int = SPLIT_SIZE):
    if split_size < 1:
      raise UserError(f"{split_size=} must be 1 or more")
    self._split_size = split_size
    self._scores = []
    self._open = 0  # samples in the open split
    self._negentropy = 0.0  # sum of p ln p over its samples and classes
    self._probs = None  # [c] sum of p over its samples

  def update(self, logits) -> None:
    """Takes [b, c] logits of any float dtype, b from 0 on."""
    logits = check_features(logits, "logits")
    num_classes = logits.shape[1]
    if self._probs is None:
      self._probs = np.zeros(num_classes)
    if len(self._probs) != num_classes:
      raise UserError(
        f"logits are of {num_classes} classes, after {len(self._probs)} before"
      )
    while len(logits):
      taken = min(len(logits), self._split_size - self._open, _CHUNK)
      log_probs = _log_softmax(logits[:taken].astype(np.float64))
      probs = np.exp(log_probs)
      self._negentropy += np.vdot(probs, log_probs)
      self._probs += probs.sum(axis=0)
      self._open += taken
      logits = logits[taken:]
      if self._open == self._split_size:
        self._scores.append(self._open_score())
        self._open, self._negentropy = 0, 0.0
        self._probs = np.zeros(num_classes)

  def result(self) -> float:
    """The score, in [1, c]; UserError before the first sample."""
    scores = self._scores + ([self._open_score()] if self._open else [])
    if not scores:
      raise UserError("no logits yet: an inception score needs at least one")
    return float(np.mean(scores))

  def state(self) -> dict[str, np.ndarray]:
    """Copies of everything it holds; `from_state` resumes to the same bits."""
    return {
      "split_size": np.int64(self._split_size),
      "scores": np.array(self._scores, np.float64),
      "open": np.int64(self._open),
      "negentropy": np.float64(self._negentropy),
      "probs": np.zeros(0) if self._probs is None else self._probs.copy(),
    }

  @classmethod
  def from_state(cls, state: Mapping[str, np.ndarray]) -> "InceptionScore":
    """The score that had this `state`."""
    score = cls(int(state["split_size"]))
    score._scores = [float(x) for x in state["scores"]]
    score._open = int(state["open"])
    score._negentropy = float(state["negentropy"])
    score._probs = np.array(state["probs"]) if len(state["probs"]) else None
    return score

  def _open_score(self) -> float:
    """(1) as exp of mean_i sum_c p ln p - sum_c q ln q."""
    q = self._probs / self._open
    q = q[q > 0]  # x ln x goes to 0
    return np.exp(self._negentropy / self._open - np.sum(q * np.log(q)))


def score_samples(samples, reference) -> dict[str, float]:
  """Row of the table: needs the samples alone."""
  del reference
  return {"inception_score": samples.score.result()}


def inception_score(logits, split_size: int = SPLIT_SIZE) -> float:
  """Inception score (1), the mean over splits of consecutive samples.

  Args:
    logits: [n, c] of any float dtype, without the last layer's bias by custom.
    split_size: samples of a split; the last may have fewer.

  Returns:
    In [1, c].

  Raises:
    UserError: no samples, or an array that is not logits.
  """
  score = InceptionScore(split_size)
  score.update(logits)
  return score.result()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  """ln p over the last axis, finite for any finite logits."""
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
