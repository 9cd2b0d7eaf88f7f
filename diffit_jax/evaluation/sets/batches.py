"""Batches of images on the devices: read from files, or made by a network.

A batch always has the same size; its rows beyond the last image are copies of
it, and the code that asked for the batch drops them.
"""

from collections.abc import Callable
from typing import Protocol

import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.evaluation.sets.image_set import ImageSet, as_rgb
from diffit_jax.parallel.sharding import batch_sharding, place


class Batches(Protocol):
  """Images that are asked for in order.

  Attributes:
    num: number of images.
  """

  num: int

  def get(self, start: int, size: int) -> jax.Array:
    """uint8 [size, h, w, 3] from image `start` on, split over the mesh.

    With several processes all must ask for the same.
    """

  def finish(self) -> None:
    """Raises a UserError for mistakes that only the whole set shows."""


class ImageBatches:
  """Some images of a set; each process reads those of its own devices."""

  def __init__(
    self, images: ImageSet, mesh: Mesh, index: np.ndarray, guard: Guard
  ):
    """`index` [num]: which images, in which order."""
    self.num, self._index, self._guard = len(index), index, guard
    self._images, self._sharding = images, batch_sharding(mesh)

  def get(self, start: int, size: int) -> jax.Array:
    """See Batches."""
    rows = np.arange(start, start + size).clip(max=self.num - 1)

    def read(part: tuple[slice, ...]) -> np.ndarray:
      index = self._index[rows[part[0]]]
      images = self._images.read(index)
      self._guard.see(images, index)
      return images

    shape = (size, *self._images.shape, 3)
    return jax.make_array_from_callback(shape, self._sharding, read)

  def finish(self) -> None:
    """See Batches."""
    self._images.tell()
    self._guard.finish()


class SampledBatches:
  """Consecutive samples of a network, made when they are asked for."""

  def __init__(
    self,
    generate: Callable[[np.ndarray], np.ndarray],
    mesh: Mesh,
    guard: Guard,
    *,
    first: int,
    num: int,
  ):
    """Samples first .. first + num - 1.

    Args:
      generate: sample indices [b] -> uint8 [b, h, w, 1 or 3].
      mesh: the devices.
      guard: sees every sample.
      first: index of the first sample.
      num: number of samples.
    """
    self.num, self._first, self._generate = num, first, generate
    self._guard, self._sharding = guard, batch_sharding(mesh)

  def get(self, start: int, size: int) -> jax.Array:
    """See Batches."""
    index = self._first + np.arange(start, start + size)
    images = self._generate(index)
    wanted = min(size, self.num - start)
    self._guard.see(images[:wanted], index[:wanted])
    return place(as_rgb(images), self._sharding)

  def finish(self) -> None:
    """See Batches."""
    self._guard.finish()
