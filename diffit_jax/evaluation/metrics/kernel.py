"""Kernel distance between two sets of features (KID), in float64.

Binkowski et al. 2018, "Demystifying MMD GANs", Section 3: the unbiased squared
maximum mean discrepancy with the kernel

  k(x, y) = (x.y / d + 1)^3                                                  (1)
"""

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics.feature_checks import check_pair


def kid(samples, reference) -> dict[str, float]:
  """Row of the table; with a standard error where there are several blocks."""
  blocks = kid_blocks(reference.rows, samples.rows())
  found = {"kid": float(blocks.mean())}
  if len(blocks) > 1:
    error = blocks.std(ddof=1) / np.sqrt(len(blocks))
    found["kid_standard_error"] = float(error)
  return found


def kernel_inception_distance(
  reference, samples, block_size: int = 1000
) -> float:
  """Kernel distance: the mean over blocks of the unbiased estimates.

  Args, errors: as `kid_blocks`.

  Returns:
    In the kernel's unit; around 0, so also below it, for equal distributions.
  """
  return float(kid_blocks(reference, samples, block_size).mean())


def kid_blocks(reference, samples, block_size: int = 1000) -> np.ndarray:
  """Unbiased squared maximum mean discrepancy of each block, float64.

  Both sets are cut into the same number of nearly equal blocks. If there is
  more than one, they are shuffled first, in the same way every time: sets are
  often sorted by class. The standard error of the mean is
  `blocks.std(ddof=1) / len(blocks) ** 0.5`.

  Args:
    reference: [n_r, d] features of real images.
    samples: [n_s, d] features of generated images.
    block_size: most points of a set in one block.

  Returns:
    [ceil(max(n_r, n_s) / block_size)] float64.

  Raises:
    UserError: a block would have fewer than two points of a set, or arrays that
      are not features.
  """
  reference, samples = check_pair(reference, samples)
  if block_size < 2:
    raise UserError(f"{block_size=} must be 2 or more")
  smaller, larger = sorted([len(reference), len(samples)])
  num_blocks = max(1, -(-larger // block_size))
  if smaller < 2 * num_blocks:
    raise UserError(
      f"sets of {len(reference)} and {len(samples)} points make {num_blocks}"
      f" blocks of at most {block_size}, and the smaller one has fewer than two"
      " points for each: take more of it, or larger blocks"
    )
  parts = [
    _blocks(x, num_blocks, seed) for seed, x in enumerate([reference, samples])
  ]
  return np.array([_unbiased_mmd(x, y) for x, y in zip(*parts)])


def _blocks(x: np.ndarray, num_blocks: int, seed: int):
  """Yields float64 blocks of shuffled rows, or all rows as they are."""
  order = np.arange(len(x))
  if num_blocks > 1:
    order = np.random.default_rng(seed).permutation(len(x))
  for rows in np.array_split(order, num_blocks):
    yield x[rows].astype(np.float64)


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased squared discrepancy of [m, d] and [n, d], with kernel (1)."""

  def kernel(a, b):
    inner = a @ b.T
    inner /= a.shape[1]
    inner += 1
    return inner * inner * inner  # a power of 3 would take many times as long

  def mean_of_pairs(a):
    values = kernel(a, a)
    return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

  return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()
