"""What `sample` wrote beside its images: its settings, in sampling.json."""

import dataclasses
import json
import pathlib
from typing import Any

from absl import logging

from diffit_jax.data import dataset as dataset_lib
from diffit_jax.evaluation.sets.image_set import ImageSet

SAMPLING_FILE = "sampling.json"


def complete(
  images: ImageSet, folder: pathlib.Path, data_dir: str | None
) -> ImageSet:
  """Adds what `sample` wrote down beside its images.

  Args:
    images: the set.
    folder: where sampling.json may be.
    data_dir: folder of the prepared data sets, one of which may know the names
      of the classes.
  """
  sampling = _read_sampling(folder)
  about = sampling.get("about")
  about = about if isinstance(about, dict) else {}
  data, num = about.get("data"), about.get("num_classes") or None
  return dataclasses.replace(
    images,
    sampling=sampling,
    num_classes=num,
    get_class_names=lambda: names_of_training(data, num, data_dir),
  )


def names_of_training(
  data: str | None, num_classes: int | None, data_dir: str | None
) -> list[str] | None:
  """Names of the classes that a network was trained on.

  Args:
    data: name of its data set.
    num_classes: number of the network's classes.
    data_dir: folder of the prepared data sets.

  Returns:
    None if the data set is not there or has other classes.
  """
  directory = data and dataset_lib.find_directory(data, data_dir)
  names = directory and dataset_lib.read_metadata(directory).get("class_names")
  return names if names and len(names) == num_classes else None


def _read_sampling(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / SAMPLING_FILE
  try:
    settings = json.loads(path.read_text()) if path.exists() else {}
  except (OSError, ValueError) as error:
    logging.warning("%s is damaged (%s): passed over", path, error)
    return {}
  return settings if isinstance(settings, dict) else {}
