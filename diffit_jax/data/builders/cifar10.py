"""CIFAR-10, by TFDS's own builder, in ArrayRecord format."""

import importlib.util
import os
from typing import Any

import tensorflow_datasets as tfds

from diffit_jax.errors import UserError

_FILE = "cifar-10-binary.tar.gz"


def recipe(source: str | None = None) -> dict[str, Any]:
  """What `preparation.prepare` needs to know to make CIFAR-10.

  Args:
    source: the archive, where it was fetched by hand; TFDS compares its
      checksum with the published one. None downloads it.
  """
  if source and os.path.basename(source) != _FILE:
    raise UserError(f"cifar10 takes --source=.../{_FILE}, not {source}")
  if source and not os.path.isfile(source):
    raise UserError(f"--source={source} does not exist")
  if importlib.util.find_spec("tensorflow") is None:
    raise UserError(
      "cifar10 is prepared by TFDS's own builder, which needs TensorFlow:"
      " pip install -c constraints.txt -e '.[prepare]'; what was prepared is"
      " read without it"
    )
  folder = os.path.dirname(os.path.abspath(source)) if source else None
  return {
    "make_builder": _make_builder,
    "name": "cifar10",
    "settings": {"builder": "tensorflow_datasets/cifar10"},
    "source": source or f"https://www.cs.toronto.edu/~kriz/{_FILE}",
    "keep_downloads": source is None,
    "manual_dir": folder,
  }


def _make_builder(data_dir: str) -> tfds.core.DatasetBuilder:
  # This builder encodes its PNGs with TensorFlow, which must not take a GPU.
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  return tfds.builder("cifar10", data_dir=data_dir, file_format="array_record")
