"""Streaming moments: against two-pass float64, and to the same bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import moments
from diffit_jax.evaluation.metrics.moments import Moments


def features(n: int, d: int = 5, seed: int = 0) -> np.ndarray:
  """[n, d] correlated, of unequal scales, drifting as data sorted by class."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * np.arange(1, d + 1)
  return x + np.linspace(-3, 3, n)[:, None]


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and covariance, ddof 1, in extended precision."""
  x = x.astype(np.longdouble)
  mean = x.mean(0)
  centred = x - mean
  covariance = np.einsum("ni,nj->ij", centred, centred) / (len(x) - 1)
  return mean.astype(np.float64), covariance.astype(np.float64)


def streamed(x, *sizes: int) -> Moments:
  """Moments after batches of these sizes, the last repeated."""
  result, start = Moments(x.shape[1]), 0
  sizes = list(sizes)
  while start < len(x):
    size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
    result.update(x[start : start + size])
    start += size
  return result


def assert_close(found: Moments, x, rtol=1e-12):
  mean, covariance = reference(x)
  assert found.num == len(x)
  scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
  np.testing.assert_allclose(
    found.mean, mean, rtol=rtol, atol=rtol * np.sqrt(covariance.max())
  )
  np.testing.assert_array_less(
    np.abs(found.covariance() - covariance) / scale, rtol
  )


def assert_same(a: Moments, b: Moments):
  assert a.num == b.num
  np.testing.assert_array_equal(a.mean, b.mean)
  np.testing.assert_array_equal(a.covariance(), b.covariance())


# On both sides of one and of two blocks.
@pytest.mark.parametrize("n", [2, 3, 2047, 2048, 2049, 4096, 5000])
def test_equals_two_passes(n):
  x = features(n)
  assert_close(streamed(x, n), x)


def test_values_by_hand():
  """Rows (1, 0), (3, 0), (5, 3): sums of squares over n - 1 = 2."""
  found = Moments(2)
  found.update(np.array([[1, 0], [3, 0]], np.float32))
  found.update(jnp.array([[5.0, 3.0]], jnp.bfloat16))
  np.testing.assert_array_equal(found.mean, [3, 1])
  np.testing.assert_array_equal(found.covariance(), [[4, 3], [3, 3]])
  assert found.mean.dtype == found.covariance().dtype == np.float64


@pytest.mark.parametrize("sizes", [(1,), (64,), (1000, 3000, 7), (2048,)])
def test_batches_make_no_bit_of_difference(sizes):
  x = features(4500)
  assert_same(streamed(x, *sizes), streamed(x, len(x)))


def test_looking_changes_nothing():
  x = features(4500)
  watched = Moments(x.shape[1])
  for part in np.array_split(x, 9):
    watched.update(part)
    watched.mean, watched.num, watched.covariance(), watched.state()  # noqa: B018
  assert_same(watched, streamed(x, len(x)))


@pytest.mark.parametrize("num", [1, 700, 2048, 3000])
def test_state_resumes_to_the_same_bits(num):
  x = features(4500)
  first = streamed(x[:num], num)
  stored = first.state()
  first.update(x[num:])  # must not reach into what was stored
  resumed = Moments.from_state(stored)
  assert resumed.num == num
  resumed.update(x[num:])
  assert_same(resumed, streamed(x, len(x)))
  assert all(isinstance(a, np.ndarray) for a in stored.values())


def test_a_large_mean_costs_only_the_digits_that_it_has_itself():
  """Deviations of 1 about 1e8: sum xx - n mm would lose all 16 digits.

  Ours loses what the rounding of a block's mean does, eps |mean|, and not its
  square. The deviations are multiples of 2^-10, so that adding the mean rounds
  nothing.
  """
  mean = 2.0**27
  x = np.round(features(5000) * 2**10) / 2**10 + mean
  assert_close(streamed(x, 64), x, rtol=np.finfo(np.float64).eps * mean)


def test_a_first_block_far_away_costs_no_digits():
  x = features(6000)
  x[:2048] += 1e5
  assert_close(streamed(x, 500), x)


def test_float32_is_accumulated_in_float64():
  x = features(4500).astype(np.float32)
  assert_close(streamed(x, 100), x)


def test_refusals():
  found = Moments(3)
  with pytest.raises(UserError, match="no features yet"):
    _ = found.mean
  found.update(np.zeros((0, 3)))
  found.update(np.zeros((1, 3)))
  with pytest.raises(UserError, match="needs 2 or more features, not 1"):
    found.covariance()
  with pytest.raises(UserError, match="4 dimensions, not 3"):
    found.update(np.zeros((2, 4)))
  with pytest.raises(UserError, match="at least one dimension"):
    Moments(0)
  bad = np.zeros((5, 3))
  bad[2, 1] = np.nan
  with pytest.raises(UserError, match="infinity or a NaN, first in row 2"):
    found.update(bad)
  assert found.num == 1  # nothing of the refused batch was taken


@pytest.mark.parametrize(
  "x, message",
  [
    (np.zeros(3), r"of shape \(3,\)"),
    (np.zeros((3, 0)), r"of shape \(3, 0\)"),
    (np.array([[1, np.inf]]), "infinity"),
    (np.array([[1, -np.inf]], np.float16), "infinity"),
    (np.zeros((2, 2), complex), "real numbers, but are complex128"),
    (np.array([["a"]]), "real numbers"),
  ],
)
def test_check_features(x, message):
  with pytest.raises(UserError, match=f"these.*{message}"):
    moments.check_features(x, "these")


def test_check_features_copies_only_to_convert():
  for dtype in (np.float32, np.float64):
    x = np.ones((2, 2), dtype)
    assert moments.check_features(x) is x
  assert moments.check_features(jnp.ones((2, 2), jnp.bfloat16)).dtype == (
    np.float32
  )
  assert moments.check_features(np.ones((2, 2), int)).dtype == np.float64
