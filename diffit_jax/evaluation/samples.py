"""What is scored: images that are there, or a network that makes them.

Both give batches of the samples of repeat 0, 1, ..., which share none, their
classes, and what a card says of them.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.batches import (
  Batches,
  ImageBatches,
  SampledBatches,
)
from diffit_jax.evaluation.classes import Classes
from diffit_jax.evaluation.guard import Guard
from diffit_jax.evaluation.image_set import Images, choose_subset
from diffit_jax.generation import generator, job
from diffit_jax.generation.labels import choose_labels
from diffit_jax.generation.weights import Weights

_SEED = 1  # of subsets; the reference's own subset has the seed 0


class ImageSamples:
  """Images of a file, a folder or a data set.

  Attributes:
    available: how many there are.
    shape: (height, width).
    about: for the card.
  """

  def __init__(self, images: Images):
    """Takes what `images.open_images` gives."""
    self.available, self.shape = images.num, images.shape
    self.about = {**images.about, "sampling": images.sampling}
    self._images = images
    # Images that `sample` made are independent of each other, or have their
    # classes in turn: the first ones are those that a network makes first.
    self._in_order = bool(images.sampling)

  def batches(self, repeat: int, num: int, mesh: Mesh) -> Batches:
    """The `num` images of a repeat."""
    guard = Guard(str(self.about["source"]))
    return ImageBatches(self._images, mesh, self._choose(repeat, num), guard)

  def classes(self, repeat: int, num: int) -> Classes | None:
    """Those of these images, or None where the images have none."""
    found = self._images.classes
    if found is None:
      return None
    index = self._choose(repeat, num)
    return dataclasses.replace(found, labels=found.labels[index])

  def subset_rule(self, num: int) -> str | None:
    """Which images `num` of them are, in words; None for all, or the first."""
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


class NetworkSamples:
  """Samples that are made while they are scored, and not kept.

  Attributes:
    available: None, for as many as one likes.
    shape: (height, width).
    about: for the card.
  """

  available = None

  def __init__(
    self,
    weights: Weights,
    model: nn.Module,
    mesh: Mesh,
    *,
    seed: int,
    labels: str,
    codec=None,
    class_names: Sequence[str] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      weights: of the network, with the config that says how to sample.
      model: the network.
      mesh: of the devices.
      seed: sample i depends on (seed, i).
      labels: see `choose_labels`.
      codec: decodes the latents of a latent model.
      class_names: of the classes 0, 1, ...; None where they are not known.

    Raises:
      UserError: as `sample_shape`; labels that the network does not have.
    """
    config = weights.config
    self.shape = sample_shape(config, codec)
    self._generate = generator.make_generator(model, config, mesh, codec)
    self._choose_labels = lambda index: choose_labels(
      index, seed, model.num_classes, labels
    )
    self._num_classes, self._class_names = model.num_classes, class_names
    self._choose_labels(np.arange(1))  # refuses wrong labels now
    self._seed, self._labels, self._codec = seed, labels, codec
    self._use(weights)

  def _use(self, weights: Weights) -> None:
    self._weights = weights
    described = job.describe(weights, self._seed, self._labels, self._codec)
    self.about: dict[str, Any] = {
      "source": weights.source,
      "kind": "network",
      "sampling": described,
    }

  def with_weights(self, weights: Weights) -> "NetworkSamples":
    """The same of other weights of the same network; compiles nothing anew."""
    other = copy.copy(self)
    other._use(weights)
    return other

  def batches(self, repeat: int, num: int, mesh: Mesh) -> Batches:
    """Samples repeat * num .. (repeat + 1) * num - 1."""
    return SampledBatches(
      self._generate,
      self._weights.params,
      mesh,
      Guard(f"the samples of {self._weights.source}"),
      num=num,
      seed=self._seed,
      classes=self._choose_labels,
      first=repeat * num,
    )

  def classes(self, repeat: int, num: int) -> Classes | None:
    """Those of these samples, or None of an unconditional network."""
    if not self._num_classes:
      return None
    index = np.arange(repeat * num, (repeat + 1) * num)
    return Classes(
      str(self.about["source"]),
      self._choose_labels(index),
      self._class_names,
      self._num_classes,
    )

  def subset_rule(self, num: int) -> None:
    """None: samples are made in order, each independent of the others."""
    del num


def sample_shape(config: Mapping, codec=None) -> tuple[int, int]:
  """(height, width) of a network's samples, decoded where they are latents.

  Raises:
    UserError: latents, and no codec that makes images of them.
  """
  if config["diffusion"]["kind"] == "adm" and codec is None:
    raise UserError(
      "--vae is missing: this model makes latents, and only images can be"
      " scored; give the diffusers folder of its VAE as --vae=..."
    )
  return generator.sample_shape(config, codec)[:2]


Samples = ImageSamples | NetworkSamples
