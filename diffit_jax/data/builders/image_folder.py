"""Any folder or zip file of images, brought to one square size."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import os
from typing import Any, TypeVar

from absl import logging
import numpy as np
from PIL import Image

from diffit_jax.data import classes, sources, transforms
from diffit_jax.data.builders import base
from diffit_jax.errors import UserError
from diffit_jax.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


class ImageFolder(base.ImageBuilder, skip_registration=True):
  """Images of a folder or a zip file, in RGB, brought to one square size."""

  def __init__(
    self,
    *,
    name: str,
    data_dir: str,
    source: sources.Source,
    resolution: int,
    crop: str,
    max_bad_fraction: float = 0.01,
    encoding: str | None = None,
  ):
    """Plans the data set; `download_and_prepare` makes it.

    Args:
      name: name of the data set.
      data_dir: where TFDS is to write.
      source: the images.
      resolution: side of the prepared images.
      crop: one of `transforms.CROPS`.
      max_bad_fraction: share of unreadable files that is put up with.
      encoding: one of `transforms.ENCODINGS`; None chooses by the resolution.
    """
    self._source, self._resolution, self._crop = source, resolution, crop
    self._max_bad_fraction = max_bad_fraction
    super().__init__(
      name=name,
      data_dir=data_dir,
      resolution=resolution,
      channels=3,
      class_names=source.class_names,
      encoding=encoding,
    )

  def examples(self) -> Iterator[dict[str, Any]]:
    names = list(self._source.sizes)
    notes = collections.Counter()
    with Progress(len(names), f"preparing {self.name}", "images") as progress:
      for name, result in zip(names, map_ahead(self._convert, names)):
        progress.update()
        if isinstance(result, Exception):
          self._skip(name, result)
          continue
        notes.update(result.notes)
        example = {"image": result.image, "id": classes.name_as_text(name)}
        if self._source.labels:
          example["label"] = self._source.labels[name]
        yield example
    if len(self.skipped) == len(names):
      raise UserError(f"no image of {self._source.path} could be read")
    for note, count in sorted(notes.items()):
      logging.warning("%d of %d images %s", count, len(names), note)

  def _convert(self, name: str) -> "_Converted | Exception":
    """Reads and fits one image; gives back what was wrong if it cannot."""
    try:
      image, notes = fit(self._source.read(name), self._resolution, self._crop)
      return _Converted(self.encode(image), notes)
    except sources.UNREADABLE as error:
      return error

  def _skip(self, name: str, error: Exception) -> None:
    self.skipped.append(name)
    logging.warning("cannot read %s, skipped: %s", name, error)
    total = len(self._source.sizes)
    if len(self.skipped) > self._max_bad_fraction * total:
      raise UserError(
        f"{len(self.skipped)} of the {total} files of {self._source.path}"
        f" cannot be read (the last is {name!r}: {error}), more than"
        f" --max_bad_fraction={self._max_bad_fraction:g} allows"
      )


def recipe(
  source: str,
  *,
  name: str = "image_folder",
  resolution: int,
  crop: str = "center-crop",
  max_bad_fraction: float = 0.01,
  encoding: str | None = None,
) -> dict[str, Any]:
  """What `preparation.prepare` needs to know to make such a data set."""
  images = sources.open_source(source)
  fit = {"resolution": resolution, "crop": crop}
  return {
    "make_builder": lambda folder: ImageFolder(
      name=name,
      data_dir=folder,
      source=images,
      max_bad_fraction=max_bad_fraction,
      encoding=encoding,
      **fit,
    ),
    "name": name,
    "encoding": encoding,
    "settings": {
      "builder": "image_folder",
      "source_listing": images.listing_hash(),
      **fit,
    },
    "source": os.path.abspath(source),
  }


def fit(
  data: bytes | np.ndarray, resolution: int, crop: str, channels: int = 3
) -> tuple[Image.Image, list[str]]:
  """Decodes an image and brings it to one size.

  Args:
    data: the file, or pixels, [h, w, c] uint8.
    resolution: side of the result.
    crop: one of `transforms.CROPS`.
    channels: 3 for RGB, 1 for gray.

  Returns:
    The image, and what the user should know about it, as ends of the sentence
    "these images ...".

  Raises:
    One of `transforms.UNREADABLE`.
  """
  image = transforms.open_image(data, channels)
  notes = transforms.notes(image)
  if min(image.size) < resolution:
    notes.append(f"are smaller than {resolution} and were enlarged")
  if crop == "edm" and image.width != image.height:
    notes.append("are not square and were stretched (see --crop)")
  return transforms.fit(image, resolution, crop), notes


@dataclasses.dataclass(frozen=True)
class _Converted:
  """A prepared image, and what the user should know about it."""

  image: bytes | np.ndarray
  notes: list[str]


def map_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
  """`map` in threads (Pillow lets go of the lock), in order, a little ahead."""
  num_threads = os.cpu_count() or 1
  pool = futures.ThreadPoolExecutor(num_threads)
  pending = collections.deque()
  try:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) >= 4 * num_threads:
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)
