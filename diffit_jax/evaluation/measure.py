"""What is measured apart from the samples: space, reference, metrics.

The reference's features are gathered here, once for any number of cards; or,
with no samples at all, for a file of statistics.
"""

from collections.abc import Collection
import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation import card
from diffit_jax.evaluation.collector import Collector, remove_partial
from diffit_jax.evaluation.metrics import table
from diffit_jax.evaluation.metrics.statistics import (
  FeatureStatistics,
  ReferenceStatistics,
)
from diffit_jax.evaluation.sets import reference_file, references
from diffit_jax.evaluation.sets.batches import ImageBatches
from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.evaluation.sets.image_set import ImageSet
from diffit_jax.parallel import runtime


@dataclasses.dataclass(frozen=True)
class Measure:
  """What is measured, apart from the samples.

  Attributes:
    collector: the feature space on its devices.
    reference: as it was read.
    statistics: the reference's features in that space.
    wanted: metrics, as from `table.choose`.
    per_class: whether each class is compared with the same class.
  """

  collector: Collector
  reference: references.Reference
  statistics: ReferenceStatistics
  wanted: tuple[str, ...]
  per_class: bool

  @property
  def space(self) -> str:
    """Name of the feature space."""
    return self.collector.extractor.name

  @property
  def needs_rows(self) -> bool:
    """Whether features of single images are compared."""
    return self.per_class or table.need_rows(self.wanted)

  def protocol(self) -> dict[str, Any]:
    """What a card says about it."""
    reference, extractor = self.reference, self.collector.extractor
    entry, num = dict(reference.card_entry), reference.num
    if num is None and reference.images and reference.pool is None:
      num = reference.images.num
    warnings, dim = [], _dims(extractor)["pool"]
    if num is not None:
      entry["num"] = num
      if num < dim:
        warnings.append(
          f"the reference is of {num} images, fewer than the {dim} dimensions"
          " of the features: its covariance is singular"
        )
    return {
      "features": {**extractor.card_entry, "dimensions": dim},
      "reference": entry,
      "warnings": warnings,
    }


def make_measure(
  collector: Collector,
  reference: references.Reference,
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
    wanted: names of metrics; if empty, all that can be computed.
    per_class: compare each class with the same class as well.
    partial: stem of the files that keep what was gathered; None keeps
      nothing.

  Raises:
    UserError: they do not fit.
    Stopped: SIGTERM came first.
  """
  check_fit(collector, reference, shape)
  space, images = collector.extractor.name, reference.images
  wanted = table.choose(wanted, space)
  if per_class and (images is None or images.labels is None):
    raise UserError(
      "--per_class needs a reference with labels, and"
      f" {reference.source} has none: give a prepared data set,"
      " or a folder with one sub-folder per class"
    )
  labels = images.labels if per_class else None
  needs_rows = per_class or table.need_rows(wanted)
  if reference.pool is None or space != "inception":
    held = np.arange(0)
    if per_class:
      held = None
    elif needs_rows:
      held = reference_file.choose_subset(images.num)
    statistics = _gather(collector, images, held, partial).as_reference(labels)
  else:  # features of the file's images only where moments are not enough
    rows = None
    if needs_rows and images is not None:
      rows = _gather(collector, images, None, partial).rows()
    statistics = ReferenceStatistics(
      reference.pool, reference.spatial, rows, reference.missing, labels
    )
  return Measure(collector, reference, statistics, wanted, per_class)


def check_fit(
  collector: Collector, reference: references.Reference, shape: tuple[int, int]
) -> None:
  """Raises a UserError where samples, space and reference do not fit.

  Args:
    collector: the feature space on its devices.
    reference: as it was read.
    shape: (height, width) of the samples.
  """
  extractor = collector.extractor
  references.check_resolution(reference, shape)
  dims = _dims(extractor, shape)
  if reference.pool is not None and extractor.name == "inception":
    references.check_extractor(reference, extractor.card_entry)
    references.check_dims(reference, dims)
  elif reference.images is None:
    raise UserError(
      f"{reference.source} holds statistics of Inception's"
      f" features and no images: --features={extractor.name} needs images to"
      " compare with"
    )


def _dims(extractor, shape: tuple[int, int] = (8, 8)) -> dict[str, int]:
  """Lengths of the features, found without computing any."""
  images = jax.ShapeDtypeStruct((1, *shape, 3), np.uint8)
  shapes = jax.eval_shape(extractor.apply, extractor.params, images)
  return {name: x.shape[1] for name, x in shapes.items()}


def _gather(
  collector: Collector,
  images: ImageSet,
  held: np.ndarray | None,
  partial: pathlib.Path | None,
) -> FeatureStatistics:
  """Statistics of all images; see `Collector.collect`."""
  guard = Guard(images.source, refuse=False)
  return collector.collect(
    ImageBatches(images, collector.mesh, np.arange(images.num), guard),
    images.source,
    held=held,
    stem=partial,
    what="reference",
    settings={
      "images": images.card_entry,
      "held": "all" if held is None else len(held),
    },
  )


def build_reference(
  collector: Collector, images: ImageSet, out: str | os.PathLike
) -> None:
  """Writes statistics of a set of images in ADM's layout.

  Args:
    collector: the Inception on its devices.
    images: the set; all of it enters the moments, and 10,000 of it are kept.
    out: the .npz file.
  """
  out = pathlib.Path(out)
  reference_file.require_npz(out)
  subset = reference_file.choose_subset(images.num)
  found = _gather(collector, images, np.arange(0), out).as_reference(None)
  if runtime.is_process_0():
    collector.check_claim()
    blocks = (
      images.read(subset[i : i + 64]) for i in range(0, len(subset), 64)
    )
    reference_file.write_reference(
      out,
      pool=found.pool,
      spatial=found.spatial,
      images=blocks,
      num_images=len(subset),
      shape=images.shape,
      about={
        "extractor": dict(collector.extractor.card_entry),
        "num": images.num,
        "images": images.card_entry,
        "software": card.software(),
      },
    )
  remove_partial(out)
