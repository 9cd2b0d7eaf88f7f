"""Distances between two sets of features, and the score of one, in float64.

Features of generated images are compared with those of real ones:

* Frechet distance (FID; Heusel et al. 2017, "GANs trained by a two time-scale
  update rule", equation 6), between the Gaussians of both sets' moments:
    |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)                 (1)
* Inception score (`inception_score`).
* precision and recall (Kynkäänniemi et al. 2019): the share of samples inside
  the manifold of the reference, and the other way round (`neighbours`).
* kernel distance (KID; Binkowski et al. 2018, "Demystifying MMD GANs",
  Section 3), the unbiased squared maximum mean discrepancy with the kernel
    k(x, y) = (x.y / d + 1)^3                                                (2)

For (1): with S_1 = A A^T and S_2 = B B^T, the eigenvalues of S_1 S_2 other than
0 are the squared singular values of A^T B, so

  tr (S_1 S_2)^(1/2) = sum of the singular values of A^T B                   (3)

A and B come from Cholesky's method with pivots, or, where rounding (of a matrix
stored in float32) has made that inexact, from eigendecompositions, which take
many times as long. Nothing is inverted and no root of a rounding error is
taken, so that singular covariances (fewer samples than dimensions) are no
special case, as they are for a matrix square root.
"""

import numpy as np
from scipy.linalg import lapack

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import neighbours
from diffit_jax.evaluation.metrics.logit_score import (
  InceptionScore,
  inception_score,
)
from diffit_jax.evaluation.metrics.moments import check_features

__all__ = [
  "InceptionScore",
  "frechet_distance",
  "inception_score",
  "kernel_inception_distance",
  "kid_blocks",
  "precision_recall",
]


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
  """Frechet distance (1) of two Gaussians.

  Args:
    mu1: [d] mean of the one set.
    sigma1: [d, d] covariance.
    mu2: [d] mean of the other set.
    sigma2: [d, d] covariance.

  Returns:
    In the features' unit squared; what rounding puts below 0 is 0.

  Raises:
    UserError: shapes that do not agree, an infinity or a NaN, or a matrix that
      is not a covariance.
  """
  mu1, sigma1 = _check_moments(mu1, sigma1, "the first set")
  mu2, sigma2 = _check_moments(mu2, sigma2, "the second set")
  if len(mu1) != len(mu2):
    raise UserError(
      f"the sets have {len(mu1)} and {len(mu2)} dimensions: both must come from"
      " the same layer of the same network"
    )
  a = _factor(sigma1, "the first set")
  b = _factor(sigma2, "the second set")
  cross = np.linalg.svd(a.T @ b, compute_uv=False).sum()  # (3)
  distance = np.sum((mu1 - mu2) ** 2) - 2 * cross
  return max(float(distance + np.trace(sigma1) + np.trace(sigma2)), 0.0)


def _check_moments(mu, sigma, what: str) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64, of matching shapes, finite, the matrix symmetric."""
  mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
  if mu.ndim != 1 or not mu.size or sigma.shape != (mu.size, mu.size):
    raise UserError(
      f"the mean and covariance of {what} must be [d] and [d, d], but are of"
      f" shapes {mu.shape} and {sigma.shape}"
    )
  if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
    raise UserError(f"the mean or covariance of {what} is not finite")
  # Room for a matrix that was stored in float32 or accumulated without care.
  if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max():
    raise UserError(f"the covariance of {what} is not symmetric")
  return mu, (sigma + sigma.T) / 2


def _factor(sigma: np.ndarray, what: str) -> np.ndarray:
  """A [d, rank] with A A^T = sigma, to the rounding error of float64."""
  rounding = len(sigma) * np.finfo(np.float64).eps * np.abs(sigma).max()
  lower, order, rank, _ = lapack.dpstrf(sigma, lower=1, tol=rounding)
  factor = np.empty((len(sigma), rank))
  factor[order - 1] = np.tril(lower)[:, :rank]
  is_exact = np.abs(factor @ factor.T - sigma).max() <= rounding
  return factor if is_exact else _factor_by_eigenvalues(sigma, what)


def _factor_by_eigenvalues(sigma: np.ndarray, what: str) -> np.ndarray:
  """The same for a matrix that only nearly is a covariance.

  Eigenvalues below the rounding error of the decomposition are no part of it:
  the root of such an error would be far above it.
  """
  values, vectors = np.linalg.eigh(sigma)
  largest = np.abs(values).max()
  if values[0] < -1e-3 * largest:
    raise UserError(
      f"the covariance of {what} has the eigenvalue {values[0]:.3g} beside the"
      f" largest, {values[-1]:.3g}: a covariance has none below 0"
    )
  kept = values > len(sigma) * np.finfo(np.float64).eps * largest
  return vectors[:, kept] * np.sqrt(values[kept])


def precision_recall(
  reference, samples, k: int = 3, tile_size: int = neighbours.TILE
) -> tuple[float, float]:
  """Improved precision and recall, from float32 squared distances.

  A ball reaches its point's k-th nearest neighbour within its set, not counting
  the point itself, and includes its surface.

  Args:
    reference: [n_r, d] features of real images.
    samples: [n_s, d] features of generated images.
    k: neighbours.
    tile_size: points at a time; memory and speed only.

  Returns:
    precision: share of samples inside at least one ball of the reference.
    recall: share of the reference inside at least one ball of the samples.

  Raises:
    UserError: fewer than k + 1 points in a set, or features that are none.
  """
  reference, samples = _check_pair(reference, samples)
  if k < 1 or tile_size < 1:
    raise UserError(f"{k=} and {tile_size=} must be 1 or more")
  if min(len(reference), len(samples)) < k + 1:
    raise UserError(
      f"precision and recall with {k=} need {k + 1} or more points in each set,"
      f" not {len(reference)} of the reference and {len(samples)} samples"
    )
  frame = neighbours.frame_of(reference, samples)
  # One set at a time in tiles, which are a copy of it.
  radii = neighbours.squared_radii(
    neighbours.to_tiles(reference, frame, tile_size), k
  )
  held = neighbours.to_tiles(samples, frame, tile_size)
  in_reference, in_samples = neighbours.mutual_members(
    held,
    neighbours.squared_radii(held, k),
    neighbours.stream_tiles(reference, frame, tile_size),
    radii,
  )
  in_samples = in_samples[: len(reference)]
  return float(in_reference.mean()), float(in_samples.mean())


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
    UserError: a block would have fewer than two points of a set, or features
      that are none.
  """
  reference, samples = _check_pair(reference, samples)
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
  """Unbiased squared discrepancy of [m, d] and [n, d], with kernel (2)."""

  def kernel(a, b):
    inner = a @ b.T
    inner /= a.shape[1]
    inner += 1
    return inner * inner * inner  # a power of 3 would take many times as long

  def mean_of_pairs(a):
    values = kernel(a, a)
    return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

  return mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean()


def _check_pair(reference, samples) -> tuple[np.ndarray, np.ndarray]:
  """Both as arrays of features with the same number of dimensions."""
  reference = check_features(reference, "features of the reference")
  samples = check_features(samples, "features of the samples")
  if reference.shape[1] != samples.shape[1]:
    raise UserError(
      f"features of the reference have {reference.shape[1]} dimensions, those"
      f" of the samples {samples.shape[1]}: both must come from the same layer"
    )
  return reference, samples
