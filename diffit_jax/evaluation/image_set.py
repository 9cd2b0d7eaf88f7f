"""A set of images, wherever they come from, and how its parts are joined."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import os
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
R = TypeVar("R")
_NUM_THREADS = min(8, os.cpu_count() or 1)
_FEW = 8  # images; fewer are decoded without threads


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """A set of images.

  Attributes:
    num: of images.
    shape: (height, width) of each.
    read: from indices [k], uint8 [k, h, w, 3] of one's own; any order, from any
      thread; raises a UserError that names an image which cannot be read.
    about: for a card, in JSON's types: "source" as it was given, "kind", "num",
      and what identifies the pixels: "sha256" of a file or an array,
      "content_hash" over the names and bytes of files, or where these are too
      many "listing_hash" over names and sizes; of a data set the
      "content_hash" that `prepare` wrote down.
    sampling: the settings that `sample` wrote beside the images, or {}.
    get_labels: see `labels`; called once.
    tell: logs what there is to say of the images that were read so far.
  """

  num: int
  shape: tuple[int, int]
  read: Callable[[np.ndarray], np.ndarray]
  about: dict[str, Any]
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  get_labels: Callable[[], np.ndarray | None] = lambda: None
  tell: Callable[[], None] = lambda: None

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """int64 [num], or None; of a data set, this reads all its records."""
    return self.get_labels()


def as_rgb(images: np.ndarray) -> np.ndarray:
  """[..., 3 or 1] -> [..., 3]."""
  return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def stack(images: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Images [h, w, 3] -> [k, h, w, 3]; k may be 0."""
  return np.array(images, np.uint8).reshape(len(images), *shape, 3)


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
  """Applies a function that lets go of the interpreter, in a few threads."""
  if len(items) < _FEW or _NUM_THREADS == 1:
    return [function(item) for item in items]
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(pool.map(function, items))
