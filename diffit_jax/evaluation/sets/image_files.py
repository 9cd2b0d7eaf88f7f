"""Images in files: a folder, or a zip that is read without unpacking it."""

import collections
import hashlib
import itertools
import pathlib

from absl import logging
import numpy as np

from diffit_jax.data import sources, transforms
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets.image_set import ImageSet, map_in_threads, stack

_HASHED_BYTES = 1 << 30  # folders up to this size are read once when opened


def open_source(path: pathlib.Path, use_labels: bool = True) -> sources.Source:
  try:
    return sources.open_source(str(path), use_labels)
  except UserError as error:  # whose text names the flag of another command
    raise UserError(str(error).replace("--source=", "", 1)) from error


def of_files(source: sources.Source, kind: str, given: str) -> ImageSet:
  """The images of a listed folder or zip file."""
  names = list(source.sizes)
  first, _ = _decode(source, names[0], None)
  shape, found = first.shape[:2], {}

  def decode(name: str) -> np.ndarray:
    pixels, notes = _decode(source, name, (names[0], shape))
    if notes:
      found[name] = notes
    return pixels

  def tell() -> None:
    counts = collections.Counter(itertools.chain(*found.values()))
    for note, count in sorted(counts.items()):
      logging.warning("%d images of %s %s", count, source.path, note)

  labels = None
  if source.labels:
    labels = np.array([source.labels[name] for name in names], np.int64)
  entry = {"source": given, "kind": kind, "num": len(names)}
  return ImageSet(
    num=len(names),
    shape=shape,
    read=lambda index: stack(
      map_in_threads(decode, [names[i] for i in index]), shape
    ),
    card_entry=entry | _identify(source, names[0], shape),
    get_labels=lambda: labels,
    get_class_names=lambda: source.class_names or None,
    tell=tell,
  )


def _decode(
  source: sources.Source,
  name: str,
  first: tuple[str, tuple[int, int]] | None,
) -> tuple[np.ndarray, list[str]]:
  """An image of a source: uint8 [h, w, 3], and notes to be logged.

  `first` is the name and size of the image that others must match.
  """
  try:
    image = transforms.open_image(source.read(name))
  except sources.UNREADABLE as error:
    raise _unreadable(source, name, error) from error
  pixels = np.asarray(image)
  if first:
    _check_size(source, name, pixels.shape[:2], *first)
  return pixels, transforms.notes(image)


def _unreadable(source, name: str, error: Exception) -> UserError:
  return UserError(
    f"{source.path}: the image {name!r} cannot be read ({error}): remove or"
    " replace it"
  )


def _check_size(source, name, shape, first_name, first_shape) -> None:
  if shape != first_shape:
    raise UserError(
      f"{source.path} holds images of different sizes: {first_name!r} is"
      f" {_size(first_shape)} and {name!r} {_size(shape)}; bring them to one"
      " size with: python -m diffit_jax.prepare image_folder"
      f" --source={source.path} --resolution=SIDE"
    )


def _size(shape: tuple[int, int]) -> str:
  return f"{shape[1]} wide and {shape[0]} high"


def _identify(
  source: sources.Source, first_name: str, shape: tuple[int, int]
) -> dict[str, str]:
  """A hash that tells the source from others.

  Small sources are read, and the sizes of their images are compared.
  """
  if sum(source.sizes.values()) > _HASHED_BYTES:
    return {"listing_hash": source.listing_hash()}
  digest = hashlib.sha256()
  for name in source.sizes:
    try:
      data = source.read(name)
      width, height = transforms.read_size(data)
    except sources.UNREADABLE as error:
      raise _unreadable(source, name, error) from error
    _check_size(source, name, (height, width), first_name, shape)
    digest.update(f"{name!r} {len(data)} ".encode())
    digest.update(data)
  return {"content_hash": digest.hexdigest()}
