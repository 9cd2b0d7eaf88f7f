"""What is scored: images that are there, or a network that makes them.

Both give batches of the samples first .. first + num - 1, their labels, and
what a card says of them.
"""

from collections.abc import Mapping
import copy
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
from diffit_jax.evaluation.guard import Guard
from diffit_jax.evaluation.image_set import Images
from diffit_jax.generation import generator, job
from diffit_jax.generation.weights import Weights


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

  def batches(self, first: int, num: int, mesh: Mesh) -> Batches:
    """Images first .. first + num - 1."""
    guard = Guard(str(self.about["source"]))
    index = np.arange(first, first + num)
    return ImageBatches(self._images, mesh, index, guard)

  def labels(self, first: int, num: int) -> np.ndarray | None:
    """[num] classes, or None where the images have none."""
    labels = self._images.labels
    return None if labels is None else labels[first : first + num]


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
  ):
    """Compiles nothing yet.

    Args:
      weights: of the network, with the config that says how to sample.
      model: the network.
      mesh: of the devices.
      seed: sample i depends on (seed, i).
      labels: see `generator.choose_labels`.
      codec: decodes the latents of a latent model.

    Raises:
      UserError: as `sample_shape`; labels that the network does not have.
    """
    config = weights.config
    self.shape = sample_shape(config, codec)
    self._generate = generator.make_generator(model, config, mesh, codec)
    self._classes = lambda index: generator.choose_labels(
      index, seed, model.num_classes, labels
    )
    self._has_labels = bool(model.num_classes)
    self._classes(np.arange(1))  # refuses wrong labels now
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

  def batches(self, first: int, num: int, mesh: Mesh) -> Batches:
    """Samples first .. first + num - 1."""
    return SampledBatches(
      self._generate,
      self._weights.params,
      mesh,
      Guard(f"the samples of {self._weights.source}"),
      num=num,
      seed=self._seed,
      classes=self._classes,
      first=first,
    )

  def labels(self, first: int, num: int) -> np.ndarray | None:
    """[num] classes, or None of an unconditional network."""
    if not self._has_labels:
      return None
    return self._classes(np.arange(first, first + num))


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
