"""The inception score: closed forms and plain float64."""

import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import inception_score
from diffit_jax.evaluation.metrics.logit_score import InceptionScore

P = np.array(
  [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5], [0.6, 0.3, 0.1]]
)


# Float64 figures from a separate program.
@pytest.mark.parametrize(
  "split, expected", [(5000, 1.2335550097), (2, 1.1835806026)]
)
def test_inception_score_golden(split, expected):
  logits = np.log(P) + np.array([[5.0], [-100], [0], [900]])
  assert inception_score(logits, split) == pytest.approx(expected, abs=6e-11)


def naive_inception_score(logits, split_size) -> float:
  scores = []
  for start in range(0, len(logits), split_size):
    exps = np.exp(np.asarray(logits[start : start + split_size], np.float64))
    p = exps / exps.sum(1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1)
    scores.append(np.exp(divergence.mean()))
  return np.mean(scores)


# Splits that do and do not divide 2500, shorter and longer than a chunk.
@pytest.mark.parametrize("split", [1, 100, 999, 1024, 2000, 2500, 5000])
def test_inception_score_equals_the_plain_formula(split):
  logits = 3 * np.random.default_rng(0).normal(size=(2500, 30))
  expected = naive_inception_score(logits, split)
  assert inception_score(logits, split) == pytest.approx(expected, rel=1e-12)
  halves = logits.astype(np.float16)
  assert inception_score(halves, split) == pytest.approx(
    naive_inception_score(halves, split), rel=1e-12
  )


@pytest.mark.parametrize("size", [1, 13, 700, 2500])
def test_inception_score_of_any_batches(size):
  logits = 3 * np.random.default_rng(0).normal(size=(2500, 30))
  score = InceptionScore(999)
  for start in range(0, len(logits), size):
    score.update(logits[start : start + size])
    score.result()  # changes nothing
  assert score.result() == pytest.approx(
    inception_score(logits, 999), rel=1e-12
  )


@pytest.mark.parametrize("cut", [0, 3, 5, 7])
def test_inception_score_resumes_to_the_same_bits(cut):
  logits = np.random.default_rng(1).normal(size=(13, 6))
  whole, first = InceptionScore(5), InceptionScore(5)
  for part in (logits[:cut], logits[cut:]):
    whole.update(part)
  first.update(logits[:cut])
  second = InceptionScore.from_state(first.state())
  second.update(logits[cut:])
  assert second.result() == whole.result()


def test_inception_score_holds_sums_only():
  score = InceptionScore(500)
  score.update(np.random.default_rng(0).normal(size=(1700, 10)))
  held = [np.size(value) for value in vars(score).values()]
  assert sum(held) < 20  # 3 scores, 10 sums, 3 numbers


def test_inception_score_limits():
  """1 for equal rows, c for certain and balanced ones; between otherwise."""
  same = np.tile([1.0, 2, 3, 4], (20, 1))
  assert inception_score(same) == pytest.approx(1, rel=1e-12)
  certain = 1e4 * np.eye(8)  # naive probabilities of 0: 0 ln 0
  assert inception_score(certain) == pytest.approx(8, rel=1e-12)
  # Sorted by class, each split has but one.
  assert inception_score(np.repeat(certain, 10, 0), 10) == pytest.approx(1)
  # The short last split of one sample scores 1, with full weight.
  assert inception_score(certain[[0, 1, 2]], 2) == pytest.approx(1.5)


def test_inception_score_refusals():
  with pytest.raises(UserError, match="no logits yet"):
    InceptionScore().result()
  with pytest.raises(UserError, match="no logits yet"):
    inception_score(np.zeros((0, 3)))
  with pytest.raises(UserError, match="logits hold an infinity"):
    inception_score([[0.0, np.inf]])
  with pytest.raises(UserError, match="split_size=0"):
    InceptionScore(0)
  score = InceptionScore()
  score.update(np.zeros((2, 3)))
  with pytest.raises(UserError, match="of 4 classes, after 3"):
    score.update(np.zeros((2, 4)))
