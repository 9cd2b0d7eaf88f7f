"""The kernel distance: closed forms and plain float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import kernel, kernel_inception_distance
from diffit_jax.evaluation.metrics.kernel import kid_blocks


def features(n: int, d: int, seed: int) -> np.ndarray:
  """[n, d] correlated features."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(n, d))
  return mixed @ rng.normal(size=(d, d)) / np.sqrt(d) + 0.1 * rng.normal(size=d)


def double_sum(x, y) -> float:
  """The unbiased estimate, pair by pair."""
  kernel = lambda a, b: (sum(a * b) / len(a) + 1) ** 3
  pairs = lambda v: np.mean(
    [kernel(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if i != j]
  )
  return pairs(x) + pairs(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_equals_the_double_sum():
  x, y = features(23, 5, 0), features(17, 5, 1) + 0.5
  expected = double_sum(x, y)
  assert kernel_inception_distance(x, y) == pytest.approx(expected, rel=1e-12)
  assert kernel_inception_distance(jnp.float32(x), y) == pytest.approx(
    expected, rel=1e-6
  )


def test_kernel_distance_by_hand():
  """x = 0, 1 and y = 2, 3: k(0, 1) + k(2, 3) - 2 mean(1, 1, 27, 64)."""
  found = kernel_inception_distance([[0.0], [1]], [[2.0], [3]])
  assert found == pytest.approx(1 + 343 - 2 * 93 / 4, rel=1e-12)


def test_kernel_distance_is_unbiased():
  """Mean 0 over draws of one distribution, within 4 standard errors.

  The biased estimate, with its diagonals, is 20 of them above.
  """
  draws = np.random.default_rng(0).normal(size=(400, 2, 12, 3))
  found = np.array([kernel_inception_distance(x, y) for x, y in draws])
  assert abs(found.mean()) < 4 * found.std() / 20
  assert found.min() < 0 < found.max()


def test_kernel_blocks():
  x, y = features(250, 4, 0), features(60, 4, 1) + 1.0
  blocks = kid_blocks(x, y, block_size=100)
  assert blocks.shape == (3,) and blocks.dtype == np.float64
  assert kernel_inception_distance(x, y, 100) == blocks.mean()
  np.testing.assert_array_equal(blocks, kid_blocks(x, y, 100))
  assert kid_blocks(x, y, 250).shape == kid_blocks(x, y, 1000).shape == (1,)
  whole = kernel_inception_distance(x, y)
  assert blocks.mean() == pytest.approx(whole, rel=0.2)  # 3 parts of the data


def test_kernel_blocks_are_shuffled():
  """Sorted data: without a shuffle each block would compare unlike classes."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 3000, 2))
  x[:, 0] += np.repeat([0, 2, 4], 1000)
  y[:, 0] += np.repeat([4, 2, 0], 1000)
  blocks = kid_blocks(x, y)
  error = blocks.std(ddof=1) / np.sqrt(3)
  aligned = [kernel._unbiased_mmd(x[i::3], y[i::3]) for i in range(3)]
  unshuffled = kernel._unbiased_mmd(x[:1000], y[:1000])
  assert abs(blocks.mean()) < 0.05 * unshuffled
  assert abs(np.mean(aligned)) < 0.05 * unshuffled and error < unshuffled


def test_kernel_blocks_hold_every_point_once():
  x = np.arange(1037.0)[:, None]
  parts = list(kernel._blocks(x, 11, seed=0))
  assert {len(part) for part in parts} == {94, 95}
  np.testing.assert_array_equal(np.sort(np.concatenate(parts), 0), x)


def test_kernel_refusals():
  x = np.random.default_rng(0).normal(size=(50, 3))
  with pytest.raises(UserError, match="50 and 9 points make 5 blocks .* fewer"):
    kid_blocks(x, x[:9], block_size=10)
  assert kid_blocks(x, x[:10], block_size=10).shape == (5,)
  with pytest.raises(UserError, match="fewer than two"):
    kernel_inception_distance(x[:1], x[:1])
  with pytest.raises(UserError, match="block_size=1 "):
    kid_blocks(x, x, block_size=1)
  with pytest.raises(UserError, match="both must come from the same layer"):
    kid_blocks(x, x[:, :2])
