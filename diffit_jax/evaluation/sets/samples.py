"""What is scored: `ImageSamples` here, or a network in `network_samples`."""

import dataclasses
from typing import Any, Protocol

from jax.sharding import Mesh
import numpy as np

from diffit_jax.evaluation.sets.batches import Batches, ImageBatches
from diffit_jax.evaluation.sets.class_matching import Classes
from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.evaluation.sets.image_set import ImageSet, choose_subset

_SEED = 1  # of subsets; the reference's own subset has the seed 0


class Samples(Protocol):
  """Samples for repeats 0, 1, ..., no two of which share a sample.

  Attributes:
    available: number of samples; None for any number.
    shape: (height, width).
    card_entry: what a card says about them: "source", "kind", "sampling" (the
      settings that they were made with, or {}) and more.
  """

  available: int | None
  shape: tuple[int, int]
  card_entry: dict[str, Any]

  def batches(self, repeat: int, num: int, mesh: Mesh) -> Batches:
    """The `num` samples of a repeat."""

  def classes(self, repeat: int, num: int) -> Classes | None:
    """The classes of these samples, or None if they have none."""

  def subset_rule(self, num: int) -> str | None:
    """How `num` samples are chosen, in words; None for all, or the first."""


class ImageSamples:
  """Images of a file, a folder or a data set; see `Samples`."""

  def __init__(self, images: ImageSet):
    self.available, self.shape = images.num, images.shape
    self.card_entry = {**images.card_entry, "sampling": images.sampling}
    self._images = images
    # Images that `sample` made are independent of each other, or have their
    # classes in turn: the first ones are those that a network makes first.
    self._in_order = bool(images.sampling)

  def batches(self, repeat: int, num: int, mesh: Mesh) -> Batches:
    """See Samples."""
    guard = Guard(self._images.source)
    return ImageBatches(self._images, mesh, self._choose(repeat, num), guard)

  def classes(self, repeat: int, num: int) -> Classes | None:
    """See Samples."""
    found = self._images.classes
    if found is None:
      return None
    index = self._choose(repeat, num)
    return dataclasses.replace(found, labels=found.labels[index])

  def subset_rule(self, num: int) -> str | None:
    """See Samples."""
    if self._in_order or num == self.available:
      return None
    return (
      f"{num} of {self.available} without replacement, repeat r being"
      f" numpy.random.RandomState({_SEED}).permutation({self.available})"
      f"[{num} * r : {num} * (r + 1)]"
    )

  def _choose(self, repeat: int, num: int) -> np.ndarray:
    if self._in_order:
      return np.arange(repeat * num, (repeat + 1) * num)
    return choose_subset(self.available, num, repeat, _SEED)
