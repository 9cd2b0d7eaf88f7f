"""What turns images into features: a pure function and its parameters.

All that scores images uses an `Extractor` and knows no network, so that another
network can take the place of Inception.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import inception, inception_weights
from diffit_jax.evaluation.features import resize as resize_lib

# CHOICE: images per call without a mesh. More bring nothing on a CPU.
_CPU_BATCH_SIZE, _BATCH_SIZE = 8, 128


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
  """A network that gives features.

  Attributes:
    name: name of the feature space.
    card_entry: what a card says about it, in JSON's types.
    params: pytree of arrays, the first argument of `apply`.
    apply: (params, [b, h, w, 3] uint8) -> {name: [b, dim] float32}, "pool"
      always among them. Pure, and an image's features depend on no other
      image: under jit the images may be split over a mesh.
  """

  name: str
  card_entry: Mapping[str, Any]
  params: Any
  apply: Callable[[Any, jax.Array], dict[str, jax.Array]]

  @functools.cached_property
  def _run(self) -> Callable[[np.ndarray], dict[str, jax.Array]]:
    """`apply` with the parameters on the device, compiled."""
    return functools.partial(jax.jit(self.apply), jax.device_put(self.params))

  def outputs(self, images) -> dict[str, np.ndarray]:
    """All features of any number of images, in batches of one size.

    Compiled once per size of images; the last batch is padded.

    Args:
      images: [n, h, w, 3] uint8.

    Returns:
      What `apply` gives, as numpy arrays of n rows.

    Raises:
      UserError: other images than these.
    """
    images = np.asarray(images)
    check_images(images)
    is_cpu = jax.default_backend() == "cpu"
    size = _CPU_BATCH_SIZE if is_cpu else _BATCH_SIZE
    parts = []
    for start in range(0, max(len(images), 1), size):
      batch = images[start : start + size]
      num = len(batch)
      batch = np.pad(batch, [(0, size - num)] + [(0, 0)] * 3)
      found = self._run(batch)
      parts.append(jax.tree.map(lambda a, num=num: np.asarray(a)[:num], found))
    return jax.tree.map(lambda *a: np.concatenate(a), *parts)


class InceptionExtractor(Extractor):
  """The FID Inception."""

  def features(self, images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of [n, h, w, 3] uint8 images, any n.

    Returns:
      pool [n, 2048]; logits [n, 1008], without the bias; spatial [n, 2023];
      all float32.
    """
    found = self.outputs(images)
    return found["pool"], found["logits"], found["spatial"]


def check_images(images: np.ndarray) -> None:
  """Raises a UserError unless images are [n, h, w, 3] uint8."""
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise UserError(
      f"images are {images.dtype} of shape {images.shape}: features are taken"
      " of uint8 images [n, h, w, 3]"
    )
  if 0 in images.shape[1:3]:
    raise UserError(f"images of shape {images.shape} have no pixels")


def load_inception(
  path_or_state: str | os.PathLike | Mapping, resize: str = "tf1"
) -> InceptionExtractor:
  """The FID Inception with the weights of a file.

  Args:
    path_or_state: safetensors file in the layout of the PyTorch port, or the
      same as {name: array}.
    resize: rule by which images become 299 x 299, "tf1" or "pytorch_fid".

  Returns:
    An extractor whose `card_entry` holds the name, the SHA-256 of the weights
    and the rule.

  Raises:
    UserError: another rule, or weights that do not fit; see
      `inception_weights.read_state`.
  """
  resize_lib.check_rule(resize)
  state = inception_weights.read_state(path_or_state)
  entry = {
    "name": "inception",
    "sha256": inception_weights.digest(state),
    "resize": resize,
  }
  params = inception_weights.fold(state)
  network = inception.Inception()

  def apply(params, images):
    x = resize_lib.prepare(jnp.asarray(images), inception.SIDE, resize)
    return network.apply({"params": params}, x)

  return InceptionExtractor("inception", entry, params, apply)
