"""Batches of images on the devices: read from files, or made by a network.

A batch always has the same size; its rows beyond the last image are copies of
it, and whoever asked for the batch drops them.
"""

from collections.abc import Callable
from typing import Protocol

import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.evaluation.sets.image_set import Images
from diffit_jax.parallel.mesh import batch_sharding, place


class Batches(Protocol):
  """`num` images that are asked for in order.

  Attributes:
    num: how many there are.
  """

  num: int

  def get(self, start: int, size: int) -> jax.Array:
    """uint8 [size, h, w, 3] from image `start` on, split over the mesh.

    With several processes all must ask for the same.
    """

  def finish(self) -> None:
    """Raises a UserError for what only the whole set shows."""


class ImageBatches:
  """Some images of a set; each process reads those of its own devices."""

  def __init__(
    self, images: Images, mesh: Mesh, index: np.ndarray, guard: Guard
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
  """Samples first .. first + num - 1 of a generator, made when asked for."""

  def __init__(
    self,
    generate: Callable[..., np.ndarray],
    params,
    mesh: Mesh,
    guard: Guard,
    *,
    num: int,
    seed: int,
    classes: Callable[[np.ndarray], np.ndarray],
    first: int = 0,
  ):
    """Takes what `generation.generator.make_generator` made, and its arguments.

    Args:
      generate: (params, seed, index [b], labels [b]) -> uint8 [b, h, w, c].
      params: of the network, replicated over the mesh.
      mesh: of the devices.
      guard: sees every sample.
      num: how many samples.
      seed: of all of them.
      classes: sample indices -> labels.
      first: index of the first sample.
    """
    self.num, self._first, self._seed = num, first, seed
    self._generate, self._params, self._classes = generate, params, classes
    self._guard, self._sharding = guard, batch_sharding(mesh)

  def get(self, start: int, size: int) -> jax.Array:
    """See Batches."""
    index = self._first + np.arange(start, start + size)
    images = self._generate(
      self._params, self._seed, index.astype(np.uint32), self._classes(index)
    )
    wanted = min(size, self.num - start)
    self._guard.see(images[:wanted], index[:wanted])
    gray = np.broadcast_to(images, (*images.shape[:3], 3))
    return place(gray, self._sharding)

  def finish(self) -> None:
    """See Batches."""
    self._guard.finish()
