"""Opens images to be scored, or compared with: one form for all sources.

  array     uint8 [n, h, w, 3 or 1]
  npz       `arr_0` of that kind, and labels `arr_1` [n] where there are any
            (ADM's sample files); `arr_0` stays on disk
  folder    PNG, JPEG or WebP files; in a folder that `sample` wrote, its
            `images` in the order of their numbers, labels from its npz
  zip       the same in an archive (EDM's layout, labels in dataset.json)
  dataset   a prepared data set of images, by its name

Gray is repeated to three channels; alpha in files is dropped, as everywhere
(`data.transforms`). Images must be of one size: they are scored as they are.
"""

import dataclasses
import os
import pathlib
import re
from typing import Any

from absl import logging
import numpy as np

from diffit_jax import npz
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import records, sources, transforms
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import arrays, image_files, sampled
from diffit_jax.evaluation.sets.image_set import (
  ImageSet,
  as_rgb,
  map_in_threads,
  stack,
)


def open_images(
  where: str | os.PathLike | np.ndarray,
  data_dir: str | None = None,
  split: str = "train",
) -> ImageSet:
  """Opens what can be scored.

  Args:
    where: an array, a path or the name of a data set (see the module); a path
      that exists wins over a data set of that name.
    data_dir: folder of the prepared data sets; None stands for $TFDS_DATA_DIR
      or ~/tensorflow_datasets.
    split: part of a data set.

  Raises:
    UserError: nothing of that name, or no images of one size in 8 bits.
  """
  if isinstance(where, np.ndarray):
    return arrays.of_array(where)
  path = pathlib.Path(where)
  if path.is_dir():
    if dataset_lib.find_directory(path.name, str(path.parent)):
      return _of_dataset(path.name, str(path.parent), split, str(where))
    return _of_folder(path, str(where), data_dir)
  if not path.exists():
    name, data_dir = str(where), data_dir or dataset_lib.default_data_dir()
    if dataset_lib.find_directory(name, data_dir) is None:
      raise UserError(
        f"there is no file or folder {name}, and no prepared data set {name!r}"
        f" in {data_dir}"
      )
    return _of_dataset(name, data_dir, split, name)
  if npz.is_npz(path):
    members = npz.open_npz(path)
    images = arrays.of_npz(members, str(where))
    return sampled.complete(images, path.parent, data_dir)
  return image_files.of_files(image_files.open_source(path), "zip", str(where))


def _of_folder(
  folder: pathlib.Path, given: str, data_dir: str | None
) -> ImageSet:
  """A folder that `sample` wrote, its `images`, or a folder of any images."""
  is_inner = folder.resolve().name == "images"
  run = folder.resolve().parent if is_inner else folder
  if not (run / sampled.SAMPLING_FILE).exists():
    source = image_files.open_source(folder)
    return image_files.of_files(source, "folder", given)
  folder = run / "images"
  if not folder.is_dir():
    has_latents = (run / "latents").is_dir()
    raise UserError(
      f"{given} holds latents, no images: sample with the decoder"
      if has_latents
      else f"{given} holds no images: sampling into it has not begun"
    )
  source = image_files.open_source(folder, use_labels=False)
  # Longer numbers last: beyond a million they have more digits than the others.
  names = sorted(source.sizes, key=lambda name: (len(name), name))
  source = dataclasses.replace(
    source, sizes={name: source.sizes[name] for name in names}
  )
  images = image_files.of_files(source, "folder", given)
  get_labels = lambda: _labels_of_run(run, len(names))
  images = dataclasses.replace(images, get_labels=get_labels)
  return sampled.complete(images, run, data_dir)


def _of_dataset(name: str, data_dir: str, split: str, given: str) -> ImageSet:
  dataset = dataset_lib.open_dataset(name, data_dir, split)
  if dataset.kind != "image":
    raise UserError(
      f"the data set {dataset.directory} holds latents, no images: give the"
      " images that they were made from"
    )
  entry = {
    "source": given,
    "kind": "dataset",
    "num": dataset.num_images,
    "name": name,
    "split": split,
    "content_hash": dataset.metadata.get("content_hash"),
  }
  shape = dataset.image_shape[:2]
  return ImageSet(
    num=dataset.num_images,
    shape=shape,
    read=lambda index: stack(_read_records(dataset, index), shape),
    card_entry=entry,
    get_labels=lambda: _labels_of_dataset(dataset),
    get_class_names=lambda: dataset.class_names or None,
  )


def _read_records(
  dataset: dataset_lib.Dataset, index: np.ndarray
) -> list[np.ndarray]:
  def decode(record: dict[str, Any]) -> np.ndarray:
    try:
      return transforms.decode(record["image"], dataset.image_shape[-1])
    except sources.UNREADABLE as error:
      raise records.damage(dataset.directory, error) from error

  found = dataset.source.__getitems__(np.asarray(index).tolist())
  return [as_rgb(image) for image in map_in_threads(decode, found)]


def _labels_of_dataset(dataset: dataset_lib.Dataset) -> np.ndarray | None:
  if not dataset.num_classes:
    return None
  labels = np.empty(dataset.num_images, np.int64)
  for begin in range(0, dataset.num_images, 1024):
    index = range(begin, min(begin + 1024, dataset.num_images))
    found = dataset.source.__getitems__(index)
    labels[begin : begin + len(index)] = [record["label"] for record in found]
  return labels


def _labels_of_run(run: pathlib.Path, num: int) -> np.ndarray | None:
  """arr_1 of the npz that `sample` wrote beside its `num` images."""
  for path in sorted(run.glob("samples_*.npz")):
    if re.fullmatch(rf"samples_{num}x\d+x\d+x3\.npz", path.name):
      return arrays.read_labels(npz.open_npz(path), num, str(path))
  logging.warning(
    "%s has no npz of all its %d images: sampling is not finished, or images"
    " were added or removed",
    run,
    num,
  )
  return None
