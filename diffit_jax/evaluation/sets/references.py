"""What samples are compared with: statistics in a file, or images.

  adm     an npz of `mu` [d], `sigma` [d, d] (pool features), `mu_s`, `sigma_s`
          (spatial features) over a whole training set, and of `arr_0`, 10,000
          of its images, which precision, recall and KID need (Dhariwal and
          Nichol 2021)
  edm     an npz of `mu` and `sigma` alone (Karras et al. 2022; also
          pytorch-fid)
  images  whatever `images.open_images` takes; the statistics are to be computed

What a file does not hold is never made up from what it holds: `missing` says
which metrics it cannot serve, and why. Files that we write are of the adm kind,
with one member more, `about`: JSON that says which extractor made the features,
so that files of another one are refused and not compared with.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from diffit_jax import npz
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import image_set
from diffit_jax.evaluation.sets import opening as images_lib
from diffit_jax.evaluation.sets.image_set import Images

METRICS = ("fid", "sfid", "precision", "recall", "kid")  # against a reference
SUBSET_SIZE = 10_000  # images that an ADM file holds
_ASYMMETRY = 1e-5  # of sigma, relative to its largest entry: float32 rounding

Statistics = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """A reference.

  Attributes:
    pool: float64 mean [d] and covariance [d, d] of the pool features; None
      where they are to be computed from all `images`.
    spatial: the same of the spatial features; None also where `missing` has
      "sfid".
    images: `arr_0`, or the whole set where `pool` is None; None where the file
      has no images.
    resolution: pixels per side; None where the file does not say, or where
      images are not square.
    num: images behind the statistics; None where the file does not say.
    about: for a card, in JSON's types: "source" as it was given, "kind" ("adm",
      "edm", "images"), "sha256" of a file; of images all of `Images.about`,
      whose "kind" is then in "container"; "extractor" and all the rest of
      "file" where a file of ours says it.
    missing: {metric: why this reference cannot serve it}, of `METRICS`.
  """

  pool: Statistics | None
  spatial: Statistics | None
  images: Images | None
  resolution: int | None
  num: int | None
  about: dict[str, Any]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)


def read_reference(
  where: str | os.PathLike | np.ndarray,
  data_dir: str | None = None,
  split: str = "train",
) -> Reference:
  """Opens a reference.

  Args:
    where: a statistics file, or anything that `images.open_images` takes.
    data_dir: of data sets.
    split: of a data set.

  Raises:
    UserError: nothing there, or statistics that cannot be any.
  """
  if not isinstance(where, np.ndarray):
    path = pathlib.Path(where)
    if path.is_file() and npz.is_npz(path):
      members = npz.open_npz(path)
      if not {"mu", "sigma"}.isdisjoint(members):
        return _of_statistics(members, path, str(where), data_dir)
  images = images_lib.open_images(where, data_dir, split)
  return Reference(
    pool=None,
    spatial=None,
    images=images,
    resolution=_side(images.shape),
    num=images.num,
    about=images.about | {"kind": "images", "container": images.about["kind"]},
  )


def write_reference(
  path: str | os.PathLike,
  *,
  pool: Statistics,
  spatial: Statistics | None,
  images: Iterator[np.ndarray],
  num_images: int,
  shape: tuple[int, int],
  about: Mapping[str, Any],
) -> None:
  """Writes a statistics file of the adm kind, image by image.

  Args:
    path: ends in ".npz"; the file appears there when it is whole.
    pool: mean [d] and covariance [d, d] of the pool features.
    spatial: of the spatial features; None leaves them out.
    images: blocks of uint8 [k, h, w, 3], the images of `choose_subset`.
    num_images: in all blocks.
    shape: (height, width) of the images.
    about: in JSON's types; "extractor", what `check_extractor` compares, and
      "num", the images behind the statistics, are read again.

  Raises:
    UserError: the statistics are none, or the file cannot be written; nothing
      of it is left then, and a file that was there stays.
    ValueError: the images are not what the other arguments say.
  """
  path = pathlib.Path(path)
  if path.suffix != ".npz":
    raise UserError(
      f"the file of statistics must end in .npz, not {path.name!r}"
    )
  members = {}
  for suffix, statistics in (("", pool), ("_s", spatial)):
    if statistics is not None:
      mu, sigma = _check_statistics(*statistics, suffix, "the features")
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
  """Which images of a set go into a file: sorted indices, without repeats."""
  return np.sort(image_set.choose_subset(num, min(num, size), seed=seed))


def check_dims(reference: Reference, dims: Mapping[str, int]) -> None:
  """Raises a UserError where statistics are not of an extractor's features.

  Args:
    reference: as it was read.
    dims: {"pool": d, "spatial": d'} of the extractor, the latter if it has any.
  """
  for name, statistics in (
    ("pool", reference.pool),
    ("spatial", reference.spatial),
  ):
    if statistics is None or name not in dims:
      continue
    if len(statistics[0]) != dims[name]:
      raise UserError(
        f"{_source(reference)} holds statistics of {len(statistics[0])} {name}"
        f" features, the extractor gives {dims[name]}: use statistics made with"
        " this extractor"
      )


def check_resolution(reference: Reference, shape: tuple[int, int]) -> None:
  """Raises a UserError where a reference has images of another size.

  Args:
    reference: as it was read; without images there is nothing to compare.
    shape: (height, width) of the samples.
  """
  if reference.images and tuple(reference.images.shape) != tuple(shape):
    height, width = reference.images.shape
    raise UserError(
      f"the samples are {shape[0]}x{shape[1]} (height x width), the reference"
      f" {_source(reference)} is of {height}x{width}: use one made from images"
      " of the samples' size"
    )


def check_extractor(reference: Reference, about: Mapping[str, Any]) -> None:
  """Raises a UserError where a file of ours is of another extractor.

  Args:
    reference: as it was read; a file that says nothing of its extractor passes.
    about: the extractor at hand: "name", "sha256" of its weights, "resize".
  """
  former = reference.about.get("extractor")
  if former is None:
    return
  differences = [
    f"{key} {former.get(key)!r} there, {about.get(key)!r} here"
    for key in ("name", "sha256", "resize")
    if former.get(key) != about.get(key)
  ]
  if differences:
    raise UserError(
      f"the statistics {_source(reference)} were made with another extractor"
      f" ({'; '.join(differences)}): make them again with this one, or give the"
      " former one"
    )


def _of_statistics(
  members: dict[str, npz.Member],
  path: pathlib.Path,
  source: str,
  data_dir: str | None,
) -> Reference:
  sha256, said = npz.hash_npz(members), _read_about(members)
  pool = _read_statistics(members, "", source)
  spatial = _read_statistics(members, "_s", source)
  images = None
  if "arr_0" in members:
    images = images_lib.from_npz(members, path, source, sha256, data_dir)
  is_edm = spatial is None and images is None
  about = {"source": source, "kind": "edm" if is_edm else "adm"}
  about["sha256"] = sha256
  if said:
    about["file"] = said
  if isinstance(said.get("extractor"), dict):
    about["extractor"] = said["extractor"]
  num = said.get("num")
  return Reference(
    pool=pool,
    spatial=spatial,
    images=images,
    resolution=_side(images.shape) if images else None,
    num=num if isinstance(num, int) else None,
    about=about,
    missing=_missing(source, spatial, images),
  )


def _missing(source, spatial, images) -> dict[str, str]:
  missing = {}
  if spatial is None:
    missing["sfid"] = f"{source} holds no spatial statistics (mu_s, sigma_s)"
  if images is None:
    reason = f"{source} holds no images (arr_0)"
    missing |= dict.fromkeys(("precision", "recall", "kid"), reason)
  return missing


def _read_statistics(
  members: dict[str, npz.Member], suffix: str, source: str
) -> Statistics | None:
  names = (f"mu{suffix}", f"sigma{suffix}")
  there = [name for name in names if name in members]
  if not there:
    return None
  if len(there) == 1:
    other = next(name for name in names if name not in there)
    raise UserError(f"{source} holds {there[0]} and no {other}: it takes both")
  mu, sigma = (members[name].load() for name in names)
  return _check_statistics(mu, sigma, suffix, source)


def _check_statistics(mu, sigma, suffix: str, source: str) -> Statistics:
  """Refuses what is no mean and covariance; gives them in float64."""
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


def _read_about(members: dict[str, npz.Member]) -> dict[str, Any]:
  """The JSON of a file of ours; {} of any other."""
  member = members.get("about")
  if member is None or member.shape or member.dtype.kind != "U":
    return {}
  try:
    said = json.loads(str(member.load()))
  except ValueError:
    return {}
  return said if isinstance(said, dict) else {}


def _side(shape: tuple[int, int]) -> int | None:
  return shape[0] if shape[0] == shape[1] else None


def _source(reference: Reference) -> str:
  return str(reference.about["source"])
