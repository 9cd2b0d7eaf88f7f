"""What every metric needs: features that are real, finite, [number, dims]."""

import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError


def check_features(x, what: str = "features") -> np.ndarray:
  """Features as a numpy array; refuses those that no metric is defined for.

  Args:
    x: [n, d] numpy or JAX array of any real dtype.
    what: their name in the message.

  Returns:
    [n, d] float32 or float64, without a copy where it is that already.

  Raises:
    UserError: other shapes, other dtypes, an infinity or a NaN.
  """
  x = np.asarray(x)
  if x.ndim != 2 or not x.shape[1]:
    raise UserError(
      f"{what} must be [number, dimensions], but are of shape {x.shape}"
    )
  if x.dtype not in (np.float32, np.float64):
    if jnp.issubdtype(x.dtype, np.floating):
      x = x.astype(np.float32 if x.dtype.itemsize < 4 else np.float64)
    elif jnp.issubdtype(x.dtype, np.integer):
      x = x.astype(np.float64)
    else:
      raise UserError(f"{what} must be real numbers, but are {x.dtype}")
  # Minimum and maximum, which pass a NaN on, need no array of booleans.
  if x.size and not (np.isfinite(x.min()) and np.isfinite(x.max())):
    bad = int(np.argmin(np.isfinite(x).all(axis=1)))
    raise UserError(
      f"{what} hold an infinity or a NaN, first in row {bad}: look for a"
      " diverged model or damaged weights of the feature network"
    )
  return x


def check_pair(reference, samples) -> tuple[np.ndarray, np.ndarray]:
  """Both as arrays of features with the same number of dimensions."""
  reference = check_features(reference, "features of the reference")
  samples = check_features(samples, "features of the samples")
  if reference.shape[1] != samples.shape[1]:
    raise UserError(
      f"features of the reference have {reference.shape[1]} dimensions, those"
      f" of the samples {samples.shape[1]}: both must come from the same layer"
    )
  return reference, samples
