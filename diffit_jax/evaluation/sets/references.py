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

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from diffit_jax import npz, settings
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import arrays, opening, reference_file, sampled
from diffit_jax.evaluation.sets.image_set import ImageSet
from diffit_jax.evaluation.sets.reference_file import StoredMoments


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
    missing: {need: reason} for what the file cannot serve: "spatial" features,
      or "rows", features of single images.
  """

  pool: StoredMoments | None
  spatial: StoredMoments | None
  images: ImageSet | None
  num: int | None
  card_entry: dict[str, Any]
  missing: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def source(self) -> str:
    """The file or the images, as the user gave them."""
    return str(self.card_entry["source"])


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


def check_dims(reference: Reference, dims: Mapping[str, int]) -> None:
  """Raises a UserError if statistics have other dimensions than an extractor.

  Args:
    reference: as it was read.
    dims: {"pool": d, "spatial": d'}, lengths of the extractor's features;
      "spatial" only if it has any.
  """
  for name, moments in (
    ("pool", reference.pool),
    ("spatial", reference.spatial),
  ):
    if moments and len(moments[0]) != dims.get(name, len(moments[0])):
      raise UserError(
        f"{reference.source} holds statistics of {len(moments[0])} {name}"
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
      f" {reference.source} is of {height}x{width}: use one made from images"
      " of the samples' size"
    )


def check_extractor(reference: Reference, extractor: Mapping[str, Any]) -> None:
  """Raises a UserError if a file of ours was made with another extractor.

  Args:
    reference: as it was read; a file that does not name its extractor passes.
    extractor: what a card says about the extractor at hand: "name", "sha256" of
      its weights, "resize".
  """
  former = reference.card_entry.get("extractor", extractor)
  decisive = lambda said: {k: said.get(k) for k in ("name", "sha256", "resize")}
  different = settings.differences(decisive(former), decisive(extractor))
  if different:
    raise UserError(
      f"the statistics {reference.source} were made with another extractor"
      f" ({'; '.join(different)}): make them again with this one, or give the"
      " former one"
    )


def _of_statistics(
  members: dict[str, npz.Member],
  path: pathlib.Path,
  source: str,
  data_dir: str | None,
) -> Reference:
  sha256, said = npz.hash_npz(members), reference_file.read_about(members)
  pool = reference_file.read_moments(members, "", source)
  spatial = reference_file.read_moments(members, "_s", source)
  images, missing = None, {}
  if spatial is None:
    missing["spatial"] = f"{source} holds no spatial statistics (mu_s, sigma_s)"
  if "arr_0" not in members:
    missing["rows"] = f"{source} holds no images (arr_0)"
  else:
    images = arrays.of_npz(members, source, sha256)
    images = sampled.complete(images, path.parent, data_dir)
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
    missing=missing,
  )
