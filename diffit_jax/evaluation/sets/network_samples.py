"""Samples that a network makes while they are scored, and that are not kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
import numpy as np

from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets.batches import Batches, SampledBatches
from diffit_jax.evaluation.sets.class_matching import Classes
from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.generation import description, generator
from diffit_jax.generation.labels import choose_labels


class NetworkSamples:
  """Samples of a network; see `samples.Samples`."""

  available = None

  def __init__(
    self,
    weights,
    model: nn.Module,
    generate: Callable[..., np.ndarray],
    *,
    seed: int,
    labels: str,
    codec=None,
    class_names: Sequence[str] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      weights: `generation.weights.Weights`, with the config that says how to
        sample.
      model: the network.
      generate: made by `generator.make_generator` of these and the codec; one
        that serves several weights is compiled once.
      seed: sample i depends on (seed, i).
      labels: see `choose_labels`.
      codec: decodes the latents of a latent model.
      class_names: names of the classes 0, 1, ...; None if they are not known.

    Raises:
      UserError: see `sample_shape`; or labels that the network does not have.
    """
    self.shape = sample_shape(weights.config, codec)
    self._choose_labels = lambda index: choose_labels(
      index, seed, model.num_classes, labels
    )
    self._choose_labels(np.arange(1))  # refuses wrong labels now
    self._generate = lambda index: generate(
      weights.params, seed, index.astype(np.uint32), self._choose_labels(index)
    )
    self._num_classes, self._class_names = model.num_classes, class_names
    self.card_entry: dict[str, Any] = {
      "source": weights.source,
      "kind": "network",
      "sampling": description.describe(weights, seed, labels, codec),
    }

  def batches(self, repeat: int, num: int, mesh: Mesh) -> Batches:
    """See Samples: samples repeat * num .. (repeat + 1) * num - 1."""
    guard = Guard(f"the samples of {self.card_entry['source']}")
    return SampledBatches(
      self._generate, mesh, guard, first=repeat * num, num=num
    )

  def classes(self, repeat: int, num: int) -> Classes | None:
    """See Samples."""
    if not self._num_classes:
      return None
    index = np.arange(repeat * num, (repeat + 1) * num)
    return Classes(
      str(self.card_entry["source"]),
      self._choose_labels(index),
      self._class_names,
      self._num_classes,
    )

  def subset_rule(self, num: int) -> None:
    """None: samples are made in order, each independent of the others."""
    del num


def sample_shape(config: Mapping, codec=None) -> tuple[int, int]:
  """(height, width) of a network's samples, decoded if they are latents.

  Raises:
    UserError: latents, and no codec that makes images of them.
  """
  if kinds.is_latent(config) and codec is None:
    raise UserError(
      "--vae is missing: this model makes latents, and only images can be"
      " scored; give the diffusers folder of its VAE as --vae=..."
    )
  return generator.sample_shape(config, codec)[:2]
