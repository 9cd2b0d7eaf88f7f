"""What is measured apart from the samples: space, reference, metrics.

The reference's features are gathered here, once for any number of cards; or,
with no samples at all, for a file of statistics.
"""

from collections.abc import Collection
import dataclasses
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation.collector import Collector, PartialFile
from diffit_jax.evaluation.metrics import scores
from diffit_jax.evaluation.metrics.statistics import Statistics
from diffit_jax.evaluation.sets import references as reference_lib
from diffit_jax.evaluation.sets.batches import ImageBatches
from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.evaluation.sets.image_set import Images
from diffit_jax.evaluation.sets.references import Reference
from diffit_jax.parallel import runtime


@dataclasses.dataclass(frozen=True)
class Measure:
  """What is measured, apart from the samples.

  Attributes:
    collector: the feature space on its devices.
    reference: as it was read.
    statistics: of the reference in that space.
    wanted: metrics, as from `scores.choose`.
    per_class: whether each class is compared with the same class.
  """

  collector: Collector
  reference: Reference
  statistics: scores.ReferenceStatistics
  wanted: tuple[str, ...]
  per_class: bool

  @property
  def space(self) -> str:
    """Name of the feature space."""
    return self.collector.extractor.name

  def protocol(self) -> dict[str, Any]:
    """What a card says of it."""
    reference = self.reference
    about = dict(reference.about)
    num = reference.num
    if num is None and reference.images and reference.pool is None:
      num = reference.images.num
    warnings, dim = [], _dims(self.collector.extractor)["pool"]
    if num is not None:
      about["num"] = num
      if num < dim:
        warnings.append(
          f"the reference is of {num} images, fewer than the {dim} dimensions"
          " of the features: its covariance is singular"
        )
    features = dict(self.collector.extractor.about)
    return {
      "features": features | {"dimensions": dim},
      "reference": about,
      "warnings": warnings,
    }


def make_measure(
  collector: Collector,
  reference: Reference,
  shape: tuple[int, int],
  *,
  wanted: Collection[str] = (),
  per_class: bool = False,
  partial: pathlib.Path | None = None,
) -> Measure:
  """Checks that all fits together, and gathers the reference's statistics.

  Args:
    collector: the feature space on its devices.
    reference: as it was read.
    shape: (height, width) of the samples.
    wanted: names of metrics; none for all that can be computed.
    per_class: compare each class with the same class as well.
    partial: stem of the files that keep what was gathered; None for none.

  Raises:
    UserError: they do not fit.
    Stopped: SIGTERM came first.
  """
  space = collector.extractor.name
  check_fit(collector, reference, shape)
  wanted = scores.choose(wanted, space)
  images = reference.images
  if per_class and (images is None or images.labels is None):
    raise UserError(
      "--per_class needs a reference with labels, and"
      f" {reference.about['source']} has none: give a prepared data set, or a"
      " folder with one sub-folder per class"
    )
  if reference.pool is None or space != "inception":
    statistics = _of_images(collector, reference, wanted, per_class, partial)
  else:
    statistics = _of_file(collector, reference, wanted, per_class, partial)
  return Measure(collector, reference, statistics, wanted, per_class)


def check_fit(
  collector: Collector, reference: Reference, shape: tuple[int, int]
) -> None:
  """Raises a UserError where samples, space and reference do not fit.

  Args:
    collector: the feature space on its devices.
    reference: as it was read.
    shape: (height, width) of the samples.
  """
  extractor = collector.extractor
  reference_lib.check_resolution(reference, shape)
  dims = _dims(extractor, shape)
  if reference.pool is not None and extractor.name == "inception":
    reference_lib.check_extractor(reference, extractor.about)
    reference_lib.check_dims(reference, dims)
  elif reference.images is None:
    raise UserError(
      f"{reference.about['source']} holds statistics of Inception's features"
      f" and no images: --features={extractor.name} needs images to compare"
      " with"
    )


def _of_images(collector, reference, wanted, per_class, partial):
  """All of it from images: a set, or a file's where the file has no other."""
  images, held = reference.images, np.arange(0)
  if per_class:
    held = None
  elif scores.need_rows(wanted, collector.extractor.name):
    held = reference_lib.choose_subset(images.num)
  gathered = _gather(collector, images, held, partial)
  labels = images.labels if per_class else None
  return _statistics(gathered, {}, labels)


def _of_file(collector, reference, wanted, per_class, partial):
  """Moments of a file; features of its images only where they are needed."""
  rows = labels = None
  needs_rows = per_class or scores.need_rows(wanted, collector.extractor.name)
  if needs_rows and reference.images is not None:
    rows = _gather(collector, reference.images, None, partial).rows()
    labels = reference.images.labels if per_class else None
  return scores.ReferenceStatistics(
    reference.pool, reference.spatial, rows, reference.missing, labels
  )


def _dims(extractor, shape: tuple[int, int] = (8, 8)) -> dict[str, int]:
  """Lengths of the features, found without computing any."""
  images = jax.ShapeDtypeStruct((1, *shape, 3), np.uint8)
  shapes = jax.eval_shape(extractor.apply, extractor.params, images)
  return {name: x.shape[1] for name, x in shapes.items()}


def _gather(
  collector: Collector,
  images: Images,
  held: np.ndarray | None,
  partial: pathlib.Path | None,
) -> Statistics:
  source = str(images.about["source"])
  batches = ImageBatches(
    images,
    collector.mesh,
    np.arange(images.num),
    Guard(source, refuse=False),
  )
  settings = {
    "images": images.about,
    "extractor": dict(collector.extractor.about),
    "held": "all" if held is None else len(held),
  }
  file = partial_file(partial, "reference", settings, collector)
  return collector.collect(
    batches, f"features of {source}", held=held, partial=file
  )


def _statistics(gathered: Statistics, missing, labels):
  gaussian = lambda moments: (moments.mean, moments.covariance())
  spatial = gathered.spatial
  return scores.ReferenceStatistics(
    gaussian(gathered.pool),
    None if spatial is None else gaussian(spatial),
    gathered.rows(),
    missing,
    labels,
  )


def partial_file(
  stem: pathlib.Path | None, what: str, settings: dict, collector: Collector
) -> PartialFile | None:
  """The file that keeps what is gathered of `what`; None for no stem."""
  if stem is None:
    return None
  path = stem.with_name(f"{stem.name}.{what}.partial")
  return PartialFile(path, settings, collector.check_claim)


def remove_partial(stem: pathlib.Path) -> None:
  """Deletes what was kept for going on, once the card is written."""
  if not runtime.is_first():
    return
  ours = re.compile(rf"{re.escape(stem.name)}\.(reference|samples\d+)\.partial")
  for path in stem.parent.iterdir():
    if ours.fullmatch(path.name):
      path.unlink(missing_ok=True)


def require_npz(out: pathlib.Path) -> None:
  """Refuses another name for a file of statistics."""
  if out.suffix != ".npz":
    raise UserError(f"--out={out}: a file of statistics must end in .npz")


def build_reference(
  collector: Collector, images: Images, out: str | os.PathLike
) -> None:
  """Writes statistics of a set of images in ADM's layout.

  Args:
    collector: the Inception on its devices.
    images: the set; all of it enters the moments, and 10,000 of it are kept.
    out: the .npz file.
  """
  out = pathlib.Path(out)
  require_npz(out)
  subset = reference_lib.choose_subset(images.num)
  gathered = _gather(collector, images, np.arange(0), out)
  found = _statistics(gathered, {}, None)
  if runtime.is_first():
    collector.check_claim()
    blocks = (
      images.read(subset[i : i + 64]) for i in range(0, len(subset), 64)
    )
    reference_lib.write_reference(
      out,
      pool=found.pool,
      spatial=found.spatial,
      images=blocks,
      num_images=len(subset),
      shape=images.shape,
      about={
        "extractor": dict(collector.extractor.about),
        "num": images.num,
        "images": images.about,
        "software": card_lib.software(),
      },
    )
  remove_partial(out)
