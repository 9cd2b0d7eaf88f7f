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
import hashlib
import json
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
from diffit_jax.evaluation.sets import image_files
from diffit_jax.evaluation.sets.image_set import (
  ImageSet,
  as_rgb,
  map_in_threads,
  stack,
)

SAMPLING_FILE = "sampling.json"  # the settings that `sample` wrote
_SHOWN_RANGE = 256  # images whose range an error tells if they are not uint8


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
    return _of_array(where)
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
    return from_npz(members, path, str(where), data_dir=data_dir)
  return image_files.of_files(image_files.open_source(path), "zip", str(where))


def from_npz(
  members: dict[str, npz.Member],
  path: pathlib.Path,
  source: str,
  sha256: str | None = None,
  data_dir: str | None = None,
) -> ImageSet:
  """The images of an .npz file that is open.

  Args:
    members: {name: member}.
    path: the file.
    source: the file as the user gave it.
    sha256: the hash of the file; None if it is not known yet.
    data_dir: folder of the prepared data sets, one of which may know the names
      of the classes.

  Raises:
    UserError: no images among the members, or damage.
  """
  if "arr_0" not in members:
    raise UserError(f"{source} {_without_images(members)}")
  what = f"arr_0 of {source}"
  pixels = members["arr_0"].map()
  _check_pixels(pixels, what)
  labels = _read_labels(members, len(pixels), source)
  return dataclasses.replace(
    _of_pixels(pixels, source, "npz", sha256 or npz.hash_npz(members)),
    get_labels=lambda: labels,
    **_sampled(path.parent, data_dir),
  )


def _of_array(pixels: np.ndarray) -> ImageSet:
  _check_pixels(pixels, "the array")
  digest = hashlib.sha256(str(pixels.shape).encode())
  for image in pixels:
    digest.update(np.ascontiguousarray(image))
  return _of_pixels(pixels, "array", "array", digest.hexdigest())


def _of_pixels(
  pixels: np.ndarray, source: str, kind: str, sha256: str
) -> ImageSet:
  num = len(pixels)
  return ImageSet(
    num=num,
    shape=pixels.shape[1:3],
    read=lambda index: as_rgb(pixels[np.asarray(index, int)]),
    card_entry={"source": source, "kind": kind, "num": num, "sha256": sha256},
  )


def _of_folder(
  folder: pathlib.Path, given: str, data_dir: str | None
) -> ImageSet:
  """A folder that `sample` wrote, its `images`, or a folder of any images."""
  is_inner = folder.resolve().name == "images"
  run = folder.resolve().parent if is_inner else folder
  if not (run / SAMPLING_FILE).exists():
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
  return dataclasses.replace(
    image_files.of_files(source, "folder", given),
    get_labels=lambda: _labels_of_run(run, len(names)),
    **_sampled(run, data_dir),
  )


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
      return _read_labels(npz.open_npz(path), num, str(path))
  logging.warning(
    "%s has no npz of all its %d images: sampling is not finished, or images"
    " were added or removed",
    run,
    num,
  )
  return None


def _read_labels(
  members: dict[str, npz.Member], num: int, source: str
) -> np.ndarray | None:
  if "arr_1" not in members:
    return None
  member = members["arr_1"]
  if member.shape != (num,) or member.dtype.kind not in "iu":
    raise UserError(
      f"arr_1 of {source} is {member.dtype} {list(member.shape)}, and labels"
      f" are whole numbers, one for each of the {num} images of arr_0"
    )
  return member.load().astype(np.int64)


def _sampled(folder: pathlib.Path, data_dir: str | None) -> dict[str, Any]:
  """Fields of `ImageSet` that `sample` wrote down beside the images."""
  sampling = _read_sampling(folder)
  about = sampling.get("about")
  about = about if isinstance(about, dict) else {}
  data, num = about.get("data"), about.get("num_classes") or None
  return {
    "sampling": sampling,
    "num_classes": num,
    "get_class_names": lambda: names_of_training(data, num, data_dir),
  }


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


def _without_images(members: dict[str, npz.Member]) -> str:
  """End of the error for an npz without arr_0."""
  if not members:
    return "is empty: images are its arr_0"
  if "mu" in members:
    return "holds statistics (mu, sigma), no images: images are an npz's arr_0"
  return f"holds no arr_0, where images are, but {', '.join(sorted(members))}"


def _check_pixels(pixels: np.ndarray, what: str) -> None:
  """Refuses everything but uint8 [n, h, w, 3 or 1] with n, h, w > 0."""
  shape, is_float = list(pixels.shape), pixels.dtype.kind == "f"
  if pixels.ndim != 4:
    raise UserError(
      f"{what} has shape {shape}, and images are uint8 [number, height, width,"
      " 3 or 1]"
    )
  if not pixels.size:
    raise UserError(f"{what} holds no images, its shape being {shape}")
  if shape[3] not in (1, 3):
    raise UserError(
      f"{what} has shape {shape}: {_wrong_channels(shape, is_float)}"
    )
  if is_float:
    some = pixels[:_SHOWN_RANGE]
    raise UserError(
      f"{what} holds {pixels.dtype} images, from {some.min():.4g} to"
      f" {some.max():.4g}: convert to uint8 first, by the rule of what made"
      " them (ours is x * 127.5 + 128 of x in [-1, 1], clipped to 0..255 and"
      " truncated)"
    )
  if pixels.dtype != np.uint8:
    raise UserError(
      f"{what} holds {pixels.dtype} images: convert to uint8, 0..255, first"
    )


def _wrong_channels(shape: list[int], is_float: bool) -> str:
  if shape[1] in (1, 3):
    return "images are [number, height, width, 3 or 1], channels last"
  if is_float:
    return "these look like latents, to be decoded to images first"
  if shape[3] == 4:
    return "drop the fourth channel, alpha, for images have 3 or 1"
  return f"images have 3 channels or 1, not {shape[3]}"
