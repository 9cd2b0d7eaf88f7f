"""A set of images from any source, and how its parts are joined."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import os
from typing import Any, TypeVar

import numpy as np

from diffit_jax.evaluation.sets.class_matching import Classes

T = TypeVar("T")
R = TypeVar("R")
_NUM_THREADS = min(8, os.cpu_count() or 1)
_FEW = 8  # images; fewer are decoded without threads


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """A set of images.

  Attributes:
    num: number of images.
    shape: (height, width) of each.
    read: indices [k] -> uint8 [k, h, w, 3], a new array; in any order and from
      any thread; raises a UserError that names an image that cannot be read.
    card_entry: what a card says about them, in JSON's types: "source" as it was
      given, "kind", "num", and what identifies the pixels: "sha256" of a file
      or an array, "content_hash" over the names and bytes of files, or, for
      very many bytes, "listing_hash" over names and sizes; for a data set the
      "content_hash" that `prepare` wrote down.
    sampling: the settings that `sample` wrote beside the images, or {}.
    get_labels: see `labels`; called once.
    get_class_names: names of the classes 0, 1, ...; None if they are not known.
    num_classes: number of classes; None if it is not known.
    tell: logs warnings about the images that were read so far.
  """

  num: int
  shape: tuple[int, int]
  read: Callable[[np.ndarray], np.ndarray]
  card_entry: dict[str, Any]
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  get_labels: Callable[[], np.ndarray | None] = lambda: None
  get_class_names: Callable[[], Sequence[str] | None] = lambda: None
  num_classes: int | None = None
  tell: Callable[[], None] = lambda: None

  @property
  def source(self) -> str:
    """The images as the user gave them."""
    return str(self.card_entry["source"])

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """int64 [num], or None; reads all records of a data set."""
    return self.get_labels()

  @property
  def classes(self) -> Classes | None:
    """The classes of the images, or None if these have no labels."""
    if self.labels is None:
      return None
    return Classes(
      self.source, self.labels, self.get_class_names(), self.num_classes
    )


def choose_subset(
  total: int, size: int, part: int = 0, seed: int = 0
) -> np.ndarray:
  """Indices [size] of the images of a set that are taken, without repeats.

  Neither the first ones nor every k-th one: images may lie class by class, or
  with their classes in turn. The choice depends on (total, size, part, seed)
  alone; numpy's generator is its frozen one, which never changes.

  Args:
    total: number of images of the set; if `size` equals it, all are taken in
      order.
    size: number of images to take.
    part: number of the part, from 0 on; other parts have other images.
    seed: seed of the permutation that parts are cut from.
  """
  if size == total:
    return np.arange(total)
  order = np.random.RandomState(seed).permutation(total)
  return order[part * size : (part + 1) * size]


def as_rgb(images: np.ndarray) -> np.ndarray:
  """[..., 3 or 1] -> [..., 3]."""
  return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def stack(images: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Images [h, w, 3] -> [k, h, w, 3]; k may be 0."""
  return np.array(images, np.uint8).reshape(len(images), *shape, 3)


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
  """Applies a function that releases the interpreter, in a few threads."""
  if len(items) < _FEW or _NUM_THREADS == 1:
    return [function(item) for item in items]
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(pool.map(function, items))
