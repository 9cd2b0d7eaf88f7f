"""Fréchet distance between two sets of features: FID, sFID, intra-FID.

The distance between two Gaussians (FID; Heusel et al. 2017, "GANs trained by a
two time-scale update rule", equation 6), here those of both sets' moments:

  |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)                   (1)

With S_1 = A A^T and S_2 = B B^T, the eigenvalues of S_1 S_2 other than 0 are
the squared singular values of A^T B, so

  tr (S_1 S_2)^(1/2) = sum of the singular values of A^T B                   (2)

A and B come from Cholesky's method with pivots. Where rounding (of a matrix
stored in float32) has made that inexact, they come from eigendecompositions,
which take many times as long. Nothing is inverted, and no root of a rounding
error is taken. So singular covariances (fewer samples than dimensions) are no
special case, as they are for a matrix square root.
"""

from collections.abc import Collection

import numpy as np
from scipy.linalg import lapack

from diffit_jax.errors import UserError


def fid(samples, reference) -> dict[str, float]:
  """Row of the table: the distance of the pool features."""
  return {"fid": frechet_distance(*samples.pool.gaussian(), *reference.pool)}


def sfid(samples, reference) -> dict[str, float]:
  """Row of the table: the distance of the spatial features."""
  ours, theirs = samples.spatial.gaussian(), reference.spatial
  return {"sfid": frechet_distance(*ours, *theirs)}


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
  cross = np.linalg.svd(a.T @ b, compute_uv=False).sum()  # (2)
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


def per_class(
  rows: np.ndarray,
  labels: np.ndarray,
  reference,
  pairs: Collection[tuple[str, int, int]],
) -> dict[str, float]:
  """Fréchet distance of each class's samples from the same class's reference.

  Args:
    rows: [n, d] features of the samples.
    labels: [n] class numbers of the samples.
    reference: ReferenceStatistics with rows and labels.
    pairs: which classes are the same, see `sets.class_matching`.

  Returns:
    {title of the class: distance}.

  Raises:
    UserError: a class with fewer than two images on either side.
  """
  found = {}
  for title, our_label, their_label in pairs:
    ours = rows[labels == our_label]
    theirs = reference.rows[reference.labels == their_label]
    if min(len(ours), len(theirs)) < 2:
      raise UserError(
        f"class {title} has {len(ours)} samples and {len(theirs)} reference"
        " images, and each side needs two: make more, or leave --per_class out"
      )
    found[title] = frechet_distance(*_gaussian(theirs), *_gaussian(ours))
  return found


def _gaussian(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  rows = rows.astype(np.float64)
  return rows.mean(0), np.cov(rows, rowvar=False)
