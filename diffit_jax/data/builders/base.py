"""What the builders share: the features of an example and the bookkeeping."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from diffit_jax.data import transforms

# CHOICE: up to this side images are stored as pixels, above it as PNG files.
# Pixels of 64 x 64 are read three times as fast, for 40 % more room (0.8 GB of
# FFHQ); at 256 x 256 the room counts, and the step takes far longer.
_MAX_RAW_SIDE = 64


def choose_encoding(encoding: str | None, resolution: int) -> str:
  """One of `transforms.ENCODINGS`: the one asked for, or what fits the size."""
  return encoding or ("raw" if resolution <= _MAX_RAW_SIDE else "png")


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder of square 8-bit images with at most one label each.

  Images are given to TFDS as PNG bytes or as pixels, neither of which needs
  TensorFlow. An example is `image`, `id` (its name in the source) and, where
  the set has classes, `label`. Records are in TFDS's hashed order of the ids:
  the same on every machine and in every encoding, and bounded in memory
  (`disable_shuffling` would sort the whole set in memory).

  Attributes:
    name: name of the data set, its folder under the data directory.
    skipped: names of the source's files that could not be read.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(
    self,
    *,
    name: str,
    data_dir: str,
    resolution: int,
    channels: int,
    class_names: list[str],
    encoding: str | None = None,
  ):
    self.name = name
    self.skipped: list[str] = []
    self._shape = (resolution, resolution, channels)
    self._class_names = class_names
    self._encoding = choose_encoding(encoding, resolution)
    super().__init__(data_dir=data_dir, file_format="array_record")

  def examples(self) -> Iterator[dict[str, Any]]:
    """Yields {"image": from `encode`, "id": str, "label": int if there are}."""
    raise NotImplementedError

  def encode(self, image: Image.Image | np.ndarray) -> bytes | np.ndarray:
    """An image, as Pillow or [h, w, c] uint8, as TFDS is to store it."""
    if self._encoding == "png":
      return transforms.encode_png(image)
    return np.asarray(image).reshape(self._shape)

  def _info(self) -> tfds.core.DatasetInfo:
    if self._encoding == "png":
      image = tfds.features.Image(shape=self._shape, encoding_format="png")
    else:
      image = tfds.features.Tensor(
        shape=self._shape, dtype=np.uint8, encoding="bytes"
      )
    features = {
      "image": image,
      "id": tfds.features.Text(),
    }
    if self._class_names:
      features["label"] = tfds.features.ClassLabel(names=self._class_names)
    return tfds.core.DatasetInfo(
      builder=self,
      description=(type(self).__doc__ or "").strip(),
      features=tfds.features.FeaturesDict(features),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for example in self.examples():
      yield example["id"], example
