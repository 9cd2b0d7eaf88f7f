"""A prepared data set on disk: where it is, what it holds, random access.

It holds images, or latents: of each image and of its mirror image the mean and
the log-variance that a VAE gave (`builders.imagenet_latents`).

A data set is a folder of TFDS, `data_dir/NAME/VERSION` (or
`data_dir/NAME/CONFIG/VERSION`), in ArrayRecord format. Beside TFDS's own files
lies `prepared.json`, in which `diffit_jax.prepare` says what it made from what.
A folder counts as a data set only when it bears a version number and holds
TFDS's `dataset_info.json`; `prepare` works elsewhere and renames last, so
nothing half-made is ever read. No TensorFlow is imported here.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from diffit_jax import paths
from diffit_jax.data import builders
from diffit_jax.data.records import Records, encoding_of
from diffit_jax.errors import UserError

METADATA_FILE = "prepared.json"
MOMENTS = ("moments", "mirror_moments")  # features of latents, [h, w, 2c]
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared data set.

  Attributes:
    source: random access to the records: `len`, `[i]` and `__getitems__` give
      {"image": a file, or [h, w, c] uint8 where `encoding` is "raw", "label":
      int}, of latents {"moments",
      "mirror_moments": [h, w, 2c], "label"}; 0 where the set has no labels.
    num_images: length of the source.
    image_shape: (height, width, channels) of every image; of latents, of the
      images that were encoded.
    num_classes: labels are 0..num_classes-1; 0 where the set has no labels.
    class_names: names of the classes 0, 1, ...; their numbers where they have
      none.
    metadata: what `prepare` wrote down; empty for a set made by TFDS alone.
    directory: the folder that holds the records.
    kind: "image" or "latent".
    latent_shape: (height, width, channels) of every latent; None for images.
    encoding: encoding of the images, one of `transforms.ENCODINGS`; "png"
      stands for whatever files TFDS has.
  """

  source: Sequence[dict[str, Any]]
  num_images: int
  image_shape: tuple[int, int, int]
  num_classes: int
  metadata: dict[str, Any]
  directory: str
  kind: str = "image"
  latent_shape: tuple[int, int, int] | None = None
  encoding: str = "png"
  class_names: tuple[str, ...] = ()


def default_data_dir() -> str:
  """$TFDS_DATA_DIR, or TFDS's own default in the home directory."""
  given = os.environ.get("TFDS_DATA_DIR")
  try:
    return paths.expand(given or "~/tensorflow_datasets")
  except UserError as error:
    raise UserError(
      f"no folder of data sets: give --data_dir, or set TFDS_DATA_DIR ({error})"
    ) from error


def root_of(name: str, data_dir: str | None) -> pathlib.Path:
  """The folder of all versions of a data set; it need not be there.

  Raises:
    UserError: the address of a bucket, from which ArrayRecord cannot read.
  """
  data_dir = os.fspath(data_dir or default_data_dir())
  if "://" in data_dir:
    raise UserError(
      f"the data directory {data_dir} is no local path: use a disk or a mounted"
      " folder, and copy prepared data sets there from a bucket"
    )
  return pathlib.Path(data_dir) / name


def find_directory(name: str, data_dir: str | None) -> pathlib.Path | None:
  """The newest complete version of a data set; None where there is none."""
  root = root_of(name, data_dir)
  versions = [
    path
    for path in (root.iterdir() if root.is_dir() else ())
    if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").exists()
  ]
  by_number = lambda path: [int(part) for part in path.name.split(".")]
  return max(versions, key=by_number, default=None)


def read_metadata(directory: pathlib.Path) -> dict[str, Any]:
  """What `prepare` wrote about a data set; empty where it did not make it."""
  file = directory / METADATA_FILE
  try:
    return json.loads(file.read_text()) if file.exists() else {}
  except ValueError as error:
    raise UserError(f"data set {directory} is damaged ({file.name})") from error


def open_dataset(
  name: str,
  data_dir: str | None = None,
  split: str = "train",
  any_size: bool = False,
  command: str | None = None,
) -> Dataset:
  """Opens a prepared data set.

  Args:
    name: the data set, a folder under `data_dir`: "digits", the --name of an
      image folder, or "name/config" for TFDS sets that have configs.
    data_dir: None stands for $TFDS_DATA_DIR or ~/tensorflow_datasets.
    split: a split that the set has, TFDS's slices included ("train[:90%]").
    any_size: whether images may have different sizes; `image_shape` then has
      None for a size that differs.
    command: what makes the data set, for the error where it is missing; None is
      a guess from the name.

  Raises:
    UserError: missing, damaged, in another format, or without such a split.
  """
  directory = find_directory(name, data_dir)
  data_dir = data_dir or default_data_dir()
  command = command or builders.command(name, data_dir)
  if directory is None:
    raise UserError(
      f"no prepared data set {name!r} in {data_dir}; make it with: {command}"
    )
  if read_metadata(directory).get("kind") == "latent":
    command = builders.command(name, data_dir, kind="imagenet_latents")
  import tensorflow_datasets as tfds  # a second to import: only when it is used

  try:
    builder = tfds.builder_from_directory(str(directory))
    splits, features = builder.info.splits, builder.info.features
    num_images = sum(info.num_examples for info in splits.values())
  except Exception as error:  # whatever TFDS makes of damaged files
    raise UserError(
      f"data set {directory} is damaged ({error}); remake it with: {command}"
      " --overwrite"
    ) from error
  if not num_images:
    raise UserError(
      f"data set {directory} is empty; remake it with: {command} --overwrite"
    )
  if builder.info.file_format.value != "array_record":
    raise UserError(
      f"data set {directory} is in {builder.info.file_format.value} format,"
      f" and array_record is needed; remake it with: {command} --overwrite"
    )
  if lost := _lost_file(splits):
    raise UserError(
      f"data set {directory} is damaged ({lost}); remake it with: {command}"
      " --overwrite"
    )
  if not _is_latent(features) and not _has_images(features, any_size):
    raise UserError(
      f"data set {directory} has no images of one size; prepare them with:"
      f" {builders.command(name, data_dir, kind='image_folder')}"
    )
  return _open(builder, split, directory)


def check_matches(
  dataset: Dataset, resolution: int, channels: int, num_classes: int
) -> None:
  """Raises a UserError where a config and a data set disagree.

  Args:
    dataset: the data set.
    resolution: pixels per side that the model works on.
    channels: number of channels of the model's images.
    num_classes: classes that the model is told; 0 ignores the labels.
  """
  if dataset.kind != "image":
    raise UserError(
      f"the config wants images, the data set {dataset.directory} holds latents"
    )
  height, width, depth = dataset.image_shape
  if (height, width) != (resolution, resolution):
    raise UserError(
      f"the config wants {resolution}x{resolution} images, the data set"
      f" {dataset.directory} has {height}x{width}"
    )
  if depth != channels:
    raise UserError(
      f"the config wants {channels} colour channels, the data set"
      f" {dataset.directory} has {depth}"
    )
  _check_classes(dataset, num_classes)


def check_latents(
  dataset: Dataset,
  side: int,
  channels: int,
  num_classes: int,
  vae_hash: str | None = None,
  scaling_factor: float | None = None,
) -> None:
  """Raises a UserError where a config and a data set of latents disagree.

  Args:
    dataset: the data set.
    side: side of the latents that the model works on.
    channels: number of channels of those latents; the set holds twice as many,
      mean and log-variance.
    num_classes: classes that the model is told; 0 ignores the labels.
    vae_hash: SHA-256 of the weights of the VAE that decodes; None where it is
      not known.
    scaling_factor: what the model's latents are multiplied by; None where it is
      not known.
  """
  where = f"the data set {dataset.directory}"
  if dataset.latent_shape is None:
    raise UserError(
      f"the config wants latents, {where} holds images; encode them with:"
      " python -m diffit_jax.prepare imagenet_latents --source=... --vae=..."
    )
  height, width, depth = dataset.latent_shape
  if (height, width) != (side, side):
    raise UserError(
      f"the config wants latents of {side}x{side}, {where} has {height}x{width}"
    )
  if depth != channels:
    raise UserError(
      f"the config wants {channels} latent channels, {where} has {depth}"
      f" (mean and log-variance: {2 * depth} numbers a place)"
    )
  _check_classes(dataset, num_classes)
  settings = dataset.metadata.get("settings", {})
  former = settings.get("vae_hash")
  if vae_hash is not None and former != vae_hash:
    vae = dataset.metadata.get("vae", "a VAE it does not name")
    raise UserError(
      f"{where} was encoded by {vae} (SHA-256 {former}), and the VAE here is"
      f" another one (SHA-256 {vae_hash})"
    )
  former = settings.get("scaling_factor")
  if scaling_factor is not None and former != scaling_factor:
    raise UserError(
      f"the config scales latents by {scaling_factor}, the VAE of {where} asks"
      f" for {former}"
    )


def _check_classes(dataset: Dataset, num_classes: int) -> None:
  if num_classes and num_classes != dataset.num_classes:
    raise UserError(
      f"the config wants {num_classes} classes, the data set"
      f" {dataset.directory} has {dataset.num_classes or 'no labels'}"
    )


def find_damage(directory: pathlib.Path) -> str | None:
  """What is wrong with a data set's files; None where all of them are there."""
  import tensorflow_datasets as tfds

  try:
    return _lost_file(tfds.builder_from_directory(str(directory)).info.splits)
  except Exception as error:  # whatever TFDS makes of damaged files
    return str(error)


def _lost_file(splits: Any) -> str | None:
  """The first file of the splits that is not there with something in it."""
  for split in splits.values():
    for file in split.filepaths:
      if not os.path.exists(file) or not os.path.getsize(file):
        return f"{file} is missing or empty"
  return None


def _has_images(features: Any, any_size: bool) -> bool:
  if "image" not in features:
    return False
  shape, dtype = features["image"].shape, features["image"].np_dtype
  if encoding_of(features["image"]) == "raw" and dtype != np.uint8:
    return False
  return len(shape) == 3 and (any_size or None not in shape)


def _is_latent(features: Any) -> bool:
  return set(MOMENTS) <= set(features)


def _open(builder: Any, split: str, directory: pathlib.Path) -> Dataset:
  features = builder.info.features
  is_latent = _is_latent(features)
  keys = MOMENTS if is_latent else ["image"]
  try:
    source = Records(builder, split, keys, directory)
  except (ValueError, KeyError) as error:
    raise UserError(
      f"data set {directory} has no split {split!r}: it has"
      f" {', '.join(builder.info.splits)}"
    ) from error
  if not len(source):
    raise UserError(f"split {split!r} of data set {directory} is empty")
  metadata = read_metadata(directory)
  class_names = tuple(features["label"].names) if "label" in features else ()
  common = {
    "source": source,
    "num_images": len(source),
    "num_classes": len(class_names),
    "class_names": class_names,
    "metadata": metadata,
    "directory": str(directory),
  }
  if not is_latent:
    return Dataset(
      image_shape=tuple(features["image"].shape),
      encoding=encoding_of(features["image"]),
      **common,
    )
  height, width, depth = features["moments"].shape
  return Dataset(
    image_shape=tuple(metadata.get("image_shape", ())),
    kind="latent",
    latent_shape=(height, width, depth // 2),
    **common,
  )
