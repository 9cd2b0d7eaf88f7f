"""What the builders share: the features of an example and the bookkeeping."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class ImageBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder of square 8-bit images with at most one label each.

  Images are given to TFDS as encoded PNG bytes, which needs no TensorFlow. An
  example is `image`, `id` (its name in the source) and, where the set has
  classes, `label`. Records are in TFDS's hashed order of the ids: the same on
  every machine, and bounded in memory (`disable_shuffling` would sort the whole
  set in memory).

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
  ):
    self.name = name
    self.skipped: list[str] = []
    self._shape = (resolution, resolution, channels)
    self._class_names = class_names
    super().__init__(data_dir=data_dir, file_format="array_record")

  def examples(self) -> Iterator[dict[str, Any]]:
    """Yields {"image": PNG bytes, "id": str, "label": int where there are}."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      "image": tfds.features.Image(shape=self._shape, encoding_format="png"),
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
