"""The npz file of a reference's statistics: its members, written and read.

`mu` [d] and `sigma` [d, d] of the pool features, `mu_s` and `sigma_s` of the
spatial features, `arr_0` with some of the images, and in files that we wrote
`about`, JSON.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
from typing import Any

import numpy as np

from diffit_jax import npz
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import image_set

SUBSET_SIZE = 10_000  # images that an ADM file holds
_ASYMMETRY = 1e-5  # of sigma, relative to its largest entry: float32 rounding

StoredMoments = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]


def require_npz(out: pathlib.Path) -> None:
  """Refuses another name for a file of statistics."""
  if out.suffix != ".npz":
    raise UserError(f"--out={out}: a file of statistics must end in .npz")


def write_reference(
  path: str | os.PathLike,
  *,
  pool: StoredMoments,
  spatial: StoredMoments | None,
  images: Iterator[np.ndarray],
  num_images: int,
  shape: tuple[int, int],
  about: Mapping[str, Any],
) -> None:
  """Writes a statistics file of the adm kind, image by image.

  Args:
    path: name of the file, which appears there when it is whole.
    pool: mean [d] and covariance [d, d] of the pool features.
    spatial: the same for the spatial features; None leaves them out.
    images: blocks of uint8 [k, h, w, 3], the images of `choose_subset`.
    num_images: number of images in all blocks.
    shape: (height, width) of the images.
    about: the member of that name, in JSON's types; two of its keys are read
      again: "extractor", which `references.check_extractor` compares, and
      "num", the number of images behind the statistics.

  Raises:
    UserError: mean and covariance that cannot be any, or the file cannot be
      written; then a file that was there before stays as it was.
    ValueError: the images are not what the other arguments say.
  """
  path = pathlib.Path(path)
  members = {}
  for suffix, moments in (("", pool), ("_s", spatial)):
    if moments is not None:
      mu, sigma = _check_moments(*moments, suffix, "the features")
      members |= {f"mu{suffix}": mu, f"sigma{suffix}": sigma}
  members["about"] = np.array(json.dumps(dict(about), sort_keys=True))
  members["arr_0"] = npz.Stream((num_images, *shape, 3), np.uint8, images)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    npz.write_npz(path, members)
  except OSError as error:
    raise UserError(
      f"cannot write {path} ({error.strerror or error}): nothing of it is left"
    ) from error


def choose_subset(
  num: int, size: int = SUBSET_SIZE, seed: int = 0
) -> np.ndarray:
  """Indices of the images that go into a file: sorted, without repeats."""
  return np.sort(image_set.choose_subset(num, min(num, size), seed=seed))


def read_moments(
  members: dict[str, npz.Member], suffix: str, source: str
) -> StoredMoments | None:
  """Members mu and sigma with a suffix; None if the file has neither."""
  names = (f"mu{suffix}", f"sigma{suffix}")
  there = [name for name in names if name in members]
  if not there:
    return None
  if len(there) == 1:
    other = next(name for name in names if name not in there)
    raise UserError(f"{source} holds {there[0]} and no {other}: it takes both")
  mu, sigma = (members[name].load() for name in names)
  return _check_moments(mu, sigma, suffix, source)


def _check_moments(mu, sigma, suffix: str, source: str) -> StoredMoments:
  """Mean and covariance in float64; refuses what cannot be any."""
  mu, sigma = np.asarray(mu), np.asarray(sigma)
  names = f"mu{suffix} and sigma{suffix} of {source}"
  kinds = {array.dtype.newbyteorder("=").str[1:] for array in (mu, sigma)}
  if not kinds <= {"f4", "f8"}:
    raise UserError(
      f"{names} are {mu.dtype} and {sigma.dtype}, and float32 or float64 is"
      " needed"
    )
  if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
    raise UserError(
      f"{names} have shapes {list(mu.shape)} and {list(sigma.shape)}, which are"
      " not [d] and [d, d]"
    )
  mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
  if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
    raise UserError(
      f"{names}, of shapes {list(mu.shape)} and {list(sigma.shape)}, are not"
      " finite throughout"
    )
  asymmetry = np.abs(sigma - sigma.T).max()
  if asymmetry > _ASYMMETRY * np.abs(sigma).max():
    raise UserError(
      f"sigma{suffix} of {source}, of shape {list(sigma.shape)}, is not"
      f" symmetric (by {asymmetry:.3g}), so it is no covariance"
    )
  return mu, sigma


def read_about(members: dict[str, npz.Member]) -> dict[str, Any]:
  """The JSON in a file that we wrote; {} for any other file."""
  member = members.get("about")
  if member is None or member.shape or member.dtype.kind != "U":
    return {}
  try:
    said = json.loads(str(member.load()))
  except ValueError:
    return {}
  return said if isinstance(said, dict) else {}
