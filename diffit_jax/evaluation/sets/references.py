"""What samples are compared with: statistics in a file, or images.

  adm     an npz of `mu` [d], `sigma` [d, d] (pool features), `mu_s`, `sigma_s`
          (spatial features) over a whole training set, and of `arr_0`, 10,000
          of its images, which precision, recall and KID need (Dhariwal and
          Nichol 2021)
  edm     an npz of `mu` and `sigma` alone (Karras et al. 2022; also
          pytorch-fid)
  images  whatever `opening.open_images` takes; their statistics are computed

What a file does not hold is never made up from what it holds: `missing` says
what it lacks, and so which metrics it cannot serve. Files that we write are of
the adm kind, with one more member, `about`: JSON that says which extractor made
the features, so that statistics of another extractor are refused.
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
from diffit_jax.evaluation.sets import image_set, opening
from diffit_jax.evaluation.sets.image_set import ImageSet

SUBSET_SIZE = 10_000  # images that an ADM file holds
_ASYMMETRY = 1e-5  # of sigma, relative to its largest entry: float32 rounding

StoredMoments = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """A reference.

  Attributes:
    pool: float64 mean [d] and covariance [d, d] of the pool features; None
      if they are to be computed from all `images`.
    spatial: the same for the spatial features; None also if `missing` has
      "spatial".
    images: `arr_0`, or the whole set if `pool` is None; None if the file has no
      images.
    num: number of images behind the statistics; None if the file does not say.
    card_entry: what a card says about it, in JSON's types: "source" as it was
      given, "kind" ("adm", "edm", "images"), "sha256" of a file. For images all
      of `ImageSet.card_entry`, whose "kind" is then in "container". For a file
      that we wrote "file", all of its `about`, and "extractor", a part of it.
    missing: {"spatial" (features) or "rows" (features of single images): why
      the file cannot serve metrics that need them}.
  """

  pool: StoredMoments | None
  spatial: StoredMoments | None
  images: ImageSet | None
  num: int | None
  card_entry: dict[str, Any]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)


def read_reference(
  where: str | os.PathLike | np.ndarray,
  data_dir: str | None = None,
  split: str = "train",
) -> Reference:
  """Opens a reference.

  Args:
    where: a statistics file, or anything that `opening.open_images` takes.
    data_dir: folder of the prepared data sets.
    split: part of a data set.

  Raises:
    UserError: nothing there, or statistics that cannot be any.
  """
  if not isinstance(where, np.ndarray):
    path = pathlib.Path(where)
    if path.is_file() and npz.is_npz(path):
      members = npz.open_npz(path)
      if not {"mu", "sigma"}.isdisjoint(members):
        return _of_statistics(members, path, str(where), data_dir)
  images = opening.open_images(where, data_dir, split)
  return Reference(
    pool=None,
    spatial=None,
    images=images,
    num=images.num,
    card_entry=images.card_entry
    | {"kind": "images", "container": images.card_entry["kind"]},
  )


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
      again: "extractor", which `check_extractor` compares, and "num", the
      number of images behind the statistics.

  Raises:
    UserError: mean and covariance that cannot be any, or the file cannot be
      written; then a file that was there before stays as it was.
    ValueError: the images are not what the other arguments say.
  """
  path = pathlib.Path(path)
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
  """Indices of the images that go into a file: sorted, without repeats."""
  return np.sort(image_set.choose_subset(num, min(num, size), seed=seed))


def check_dims(reference: Reference, dims: Mapping[str, int]) -> None:
  """Raises a UserError if statistics have other dimensions than an extractor.

  Args:
    reference: as it was read.
    dims: {"pool": d, "spatial": d'}, lengths of the extractor's features;
      "spatial" only if it has any.
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
  """Raises a UserError if the reference has images of another size.

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


def check_extractor(reference: Reference, extractor: Mapping[str, Any]) -> None:
  """Raises a UserError if a file of ours was made with another extractor.

  Args:
    reference: as it was read; a file that does not name its extractor passes.
    extractor: what a card says about the extractor at hand: "name", "sha256" of
      its weights, "resize".
  """
  former = reference.card_entry.get("extractor")
  if former is None:
    return
  differences = [
    f"{key} {former.get(key)!r} there, {extractor.get(key)!r} here"
    for key in ("name", "sha256", "resize")
    if former.get(key) != extractor.get(key)
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
    images = opening.from_npz(members, path, source, sha256, data_dir)
  is_edm = spatial is None and images is None
  kind = "edm" if is_edm else "adm"
  entry = {"source": source, "kind": kind, "sha256": sha256}
  if said:
    entry["file"] = said
  if isinstance(said.get("extractor"), dict):
    entry["extractor"] = said["extractor"]
  num = said.get("num")
  return Reference(
    pool=pool,
    spatial=spatial,
    images=images,
    num=num if isinstance(num, int) else None,
    card_entry=entry,
    missing=_missing(source, spatial, images),
  )


def _missing(source, spatial, images) -> dict[str, str]:
  missing = {}
  if spatial is None:
    missing["spatial"] = f"{source} holds no spatial statistics (mu_s, sigma_s)"
  if images is None:
    missing["rows"] = f"{source} holds no images (arr_0)"
  return missing


def _read_statistics(
  members: dict[str, npz.Member], suffix: str, source: str
) -> StoredMoments | None:
  names = (f"mu{suffix}", f"sigma{suffix}")
  there = [name for name in names if name in members]
  if not there:
    return None
  if len(there) == 1:
    other = next(name for name in names if name not in there)
    raise UserError(f"{source} holds {there[0]} and no {other}: it takes both")
  mu, sigma = (members[name].load() for name in names)
  return _check_statistics(mu, sigma, suffix, source)


def _check_statistics(mu, sigma, suffix: str, source: str) -> StoredMoments:
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


def _read_about(members: dict[str, npz.Member]) -> dict[str, Any]:
  """The JSON in a file that we wrote; {} for any other file."""
  member = members.get("about")
  if member is None or member.shape or member.dtype.kind != "U":
    return {}
  try:
    said = json.loads(str(member.load()))
  except ValueError:
    return {}
  return said if isinstance(said, dict) else {}


def _source(reference: Reference) -> str:
  return str(reference.card_entry["source"])
