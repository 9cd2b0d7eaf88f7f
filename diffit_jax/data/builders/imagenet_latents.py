"""Latents of a set of images, as a VAE's mean and log-variance.

Each image is cropped by the ADM rule (`transforms.center_crop_adm`), brought to
[-1, 1] as x / 127.5 - 1, and encoded; so is its mirror image, for the latent of
a mirror image is not the mirror of the latent. A record is

  moments, mirror_moments   [h, w, 2c], mean then log-variance of the latent
                            before scaling: training draws
                            z = scaling_factor (mean + exp(logvar / 2) n)
  label                     the image's class, see `data.classes`
  id                        the image's name in its source

Records are in one fixed pseudo-random order, so that whoever reads a shard from
front to back sees mixed classes. The order, and which shard a record lies in,
follow from the source and the number of shards alone, whoever makes them.
"""

import collections
from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from diffit_jax.data import classes, shards, sources, transforms
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data.builders import image_folder
from diffit_jax.errors import UserError
from diffit_jax.progress import Progress
from diffit_jax.stop import Stopped

DTYPES = ("float16", "float32")
_CROP = "adm"
# CHOICE: 32 MiB a shard at 256 x 256 in float16, and a kill costs at most the
# encoding of so many images; TFDS's own ImageNet has 1024 files too.
_IMAGES_PER_SHARD = 1024
_MAX_SHARDS = 1024


@dataclasses.dataclass(frozen=True)
class LatentEncoder:
  """What the data set needs to know of a VAE.

  Attributes:
    encode: [b, h, w, in_channels] float32 in [-1, 1] -> mean and log-variance
      of the unscaled latent, each [b, h/f, w/f, latent_channels]; any b.
    down_factor: f.
    in_channels: 1 or 3.
    latent_channels: number of channels of mean and of log-variance.
    scaling_factor: a diffusion model's latent is this times a latent here.
    hash: tells the weights of two VAEs apart.
    source: where the VAE was read from.
  """

  encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  down_factor: int
  in_channels: int
  latent_channels: int
  scaling_factor: float
  hash: str
  source: str


@dataclasses.dataclass(frozen=True)
class SourceImages:
  """Encoded images, by number.

  Attributes:
    path: the folder, zip file or data set.
    num: how many.
    class_names: names of the classes 0, 1, ...; empty where there are none.
    listing_hash: tells two sources apart.
    name: from a number, the name of the image.
    read: from a number, the encoded image and its class (0 without classes).
  """

  path: str
  num: int
  class_names: list[str]
  listing_hash: str
  name: Callable[[int], str]
  read: Callable[[int], tuple[bytes, int]]


def open_images(source: str, data_dir: str, resolution: int) -> SourceImages:
  """Lists a source of images.

  Args:
    source: a folder (of class folders), a zip file, or the name of a prepared
      data set of images in `data_dir`, of which `train` is read.
    data_dir: where data sets live.
    resolution: side of the images that will be cropped from it.

  Raises:
    UserError: no such source, or a data set whose images were cropped by
      another rule or to another size.
  """
  if os.path.exists(source):
    return _images_of_files(sources.open_source(source))
  if dataset_lib.find_directory(source, data_dir) is None:
    raise UserError(
      f"--source={source} is neither a folder or zip file nor the name of a"
      f" prepared data set in {data_dir}"
    )
  dataset = dataset_lib.open_dataset(source, data_dir, any_size=True)
  if dataset.kind != "image":
    raise UserError(f"--source={source} holds latents already, not images")
  settings = dataset.metadata.get("settings", {})
  crop, side = settings.get("crop"), settings.get("resolution")
  if crop and (crop, side) != (_CROP, resolution):
    raise UserError(
      f"--source={source} was cropped by {crop} to {side}x{side}, and latents"
      f" of {resolution}x{resolution} need {_CROP}: give the images that it was"
      f" made from, or prepare it with image_folder --crop={_CROP}"
      f" --resolution={resolution}"
    )
  return _images_of_dataset(dataset)


def _images_of_files(source: sources.Source) -> SourceImages:
  names = list(source.sizes)
  return SourceImages(
    path=os.path.abspath(source.path),
    num=len(names),
    class_names=source.class_names,
    listing_hash=source.listing_hash(),
    name=lambda i: classes.name_as_text(names[i]),
    read=lambda i: (source.read(names[i]), source.labels.get(names[i], 0)),
  )


def _images_of_dataset(dataset: dataset_lib.Dataset) -> SourceImages:
  directory = pathlib.Path(dataset.directory)
  content = dataset.metadata.get("content_hash")
  if not content:  # not ours
    files = sorted(directory.glob("*array_record*"))
    listing = [(file.name, file.stat().st_size) for file in files]
    content = hashlib.sha256(repr(listing).encode()).hexdigest()

  def read(index: int) -> tuple[bytes, int]:
    record = dataset.source[index]
    return record["image"], record["label"]

  return SourceImages(
    path=str(directory),
    num=dataset.num_images,
    class_names=list(dataset.class_names),
    listing_hash=content,
    name=lambda i: f"train/{i:08d}",
    read=read,
  )


def fixed_order(num: int) -> np.ndarray:
  """The permutation of 0..num-1 that records are in: the same everywhere.

  Philox's raw bits, unlike numpy's shuffles, are the same in every version.
  """
  bits = np.random.Philox(key=[0, 0]).random_raw(num)
  return np.argsort(bits, kind="stable")


def prepare(
  images: SourceImages,
  encoder: LatentEncoder,
  *,
  name: str = "imagenet_latents",
  data_dir: str,
  resolution: int,
  latent_dtype: str = "float16",
  num_shards: int | None = None,
  part: int = 0,
  num_parts: int = 1,
  batch_size: int = 1,
  max_bad_fraction: float = 0.01,
  overwrite: bool = False,
  should_stop: Callable[[], bool] = lambda: False,
) -> pathlib.Path | None:
  """Makes the shards j with j % num_parts == part that are not there yet.

  Whichever process finds all shards finished publishes the data set.

  Args:
    images: what to encode.
    encoder: the VAE.
    name: name of the data set.
    data_dir: where data sets live; shared by all hosts.
    resolution: side of the cropped images.
    latent_dtype: type of the stored moments, one of `DTYPES`.
    num_shards: files of the data set; None is one for each 1024 images, and
      1024 at most.
    part: which part of the shards this process makes.
    num_parts: how many processes share the work.
    batch_size: images that are encoded, with their mirror images, at a time.
    max_bad_fraction: share of unreadable images that is put up with.
    overwrite: whether to make the set anew whatever is there.
    should_stop: asked between batches; finished shards stay.

  Returns:
    The data set; None where shards of other parts are missing.

  Raises:
    Stopped: `should_stop` said so before this part was done.
    UserError: numbers that do not go together, too many unreadable images, or
      whatever `ShardedSet` refuses.
  """
  if num_shards is None:
    num_shards = min(-(-images.num // _IMAGES_PER_SHARD), _MAX_SHARDS)
  _check(images, encoder, resolution, num_shards)
  if latent_dtype not in DTYPES:
    raise UserError(f"{latent_dtype=} must be one of {', '.join(DTYPES)}")
  run = _Run(
    images=images,
    encoder=encoder,
    target=shards.ShardedSet(
      name=name,
      data_dir=data_dir,
      features=_features(images, encoder, resolution, latent_dtype),
      num_shards=num_shards,
      settings={
        "builder": "imagenet_latents",
        "source_listing": images.listing_hash,
        "crop": _CROP,
        "resolution": resolution,
        "latent_dtype": latent_dtype,
        "num_shards": num_shards,
        "vae_hash": encoder.hash,
        "scaling_factor": encoder.scaling_factor,
      },
      origin={"source": images.path, "vae": os.path.abspath(encoder.source)},
      description=(__doc__ or "").strip(),
    ),
    resolution=resolution,
    latent_dtype=latent_dtype,
    batch_size=batch_size,
    max_bad_fraction=max_bad_fraction,
    should_stop=should_stop,
  )
  existing = run.target.begin(overwrite)
  if existing:
    return existing
  run.make(range(part, num_shards, num_parts))
  return run.target.finish(run.describe)


def _check(
  images: SourceImages,
  encoder: LatentEncoder,
  resolution: int,
  num_shards: int,
) -> None:
  if encoder.in_channels not in (1, 3):
    raise UserError(
      f"the VAE {encoder.source} encodes {encoder.in_channels} channels; images"
      " have 1 or 3"
    )
  if resolution < 1 or resolution % encoder.down_factor:
    raise UserError(
      f"--resolution={resolution} must be a multiple of {encoder.down_factor},"
      f" by which the VAE {encoder.source} divides the side of an image"
    )
  if not 1 <= num_shards <= images.num:
    raise UserError(
      f"--num_shards={num_shards} must be from 1 to the number of images,"
      f" {images.num}"
    )


def _features(
  images: SourceImages,
  encoder: LatentEncoder,
  resolution: int,
  latent_dtype: str,
) -> tfds.features.FeaturesDict:
  side = resolution // encoder.down_factor
  # As bytes: TFDS would write the float16 numbers of a plain tensor in 32 bits.
  moments = tfds.features.Tensor(
    shape=(side, side, 2 * encoder.latent_channels),
    dtype=np.dtype(latent_dtype),
    encoding="bytes",
  )
  features = {key: moments for key in dataset_lib.MOMENTS}
  features["id"] = tfds.features.Text()
  if images.class_names:
    features["label"] = tfds.features.ClassLabel(names=images.class_names)
  return tfds.features.FeaturesDict(features)


@dataclasses.dataclass(frozen=True)
class _Cropped:
  """An image that is ready to be encoded."""

  name: str
  pixels: np.ndarray  # [s, s, c] uint8
  label: int
  notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Run:
  """One process's share of the work."""

  images: SourceImages
  encoder: LatentEncoder
  target: shards.ShardedSet
  resolution: int
  latent_dtype: str
  batch_size: int
  max_bad_fraction: float
  should_stop: Callable[[], bool]
  notes: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  skipped: list[str] = dataclasses.field(default_factory=list)

  def make(self, indices: range) -> None:
    """Makes the shards that are missing."""
    order = fixed_order(self.images.num)
    bounds = np.arange(self.target.num_shards + 1) * len(order)
    bounds //= self.target.num_shards
    sizes = np.diff(bounds)
    todo = []
    for index in indices:
      report = self.target.report(index)
      if report is None:
        todo.append(index)
      else:
        self.skipped.extend(report["skipped"])
    total = int(sum(sizes[index] for index in indices))
    initial = total - int(sum(sizes[index] for index in todo))
    logging.info(
      "%d images of %d classes in %d shards, of which %d of %d here are done",
      self.images.num,
      len(self.images.class_names),
      self.target.num_shards,
      len(indices) - len(todo),
      len(indices),
    )
    with Progress(total, "encoding", "images", initial) as progress:
      for index in todo:
        chosen = order[bounds[index] : bounds[index + 1]]
        self._make_shard(index, chosen, progress)
    for note, count in sorted(self.notes.items()):
      logging.warning("%d of %d images %s", count, total - initial, note)

  def _make_shard(
    self, index: int, chosen: np.ndarray, progress: Progress
  ) -> None:
    with self.target.writing(index) as shard:
      for batch in self._batches(chosen, shard, progress):
        if self.should_stop():
          raise Stopped
        for example in self._encode(batch):
          shard.add(example)
        progress.update(len(batch))
      shard.commit()

  def _batches(
    self, chosen: np.ndarray, shard: shards.Shard, progress: Progress
  ) -> Iterator[list[_Cropped]]:
    """Reads and crops in threads, a little ahead of the encoding."""
    batch = []
    crops = image_folder.map_ahead(self._crop, chosen.tolist())
    for number, result in zip(chosen.tolist(), crops):
      if isinstance(result, Exception):
        name = self.images.name(number)
        shard.skip(name)
        progress.update()
        self._check_skipped(name, result)
        continue
      self.notes.update(result.notes)
      batch.append(result)
      if len(batch) == self.batch_size:
        yield batch
        batch = []
    if batch:
      yield batch

  def _crop(self, number: int) -> _Cropped | Exception:
    """Reads and crops one image; gives back what was wrong if it cannot."""
    try:
      data, label = self.images.read(number)
      image, notes = image_folder.fit(
        data, self.resolution, _CROP, self.encoder.in_channels
      )
    except sources.UNREADABLE as error:
      return error
    shape = (self.resolution, self.resolution, self.encoder.in_channels)
    pixels = np.asarray(image).reshape(shape)
    return _Cropped(self.images.name(number), pixels, label, notes)

  def _encode(self, batch: list[_Cropped]) -> Iterator[dict[str, Any]]:
    """The records of a batch of images."""
    pixels = np.stack([image.pixels for image in batch])
    pixels = np.concatenate([pixels, transforms.flip(pixels)])
    mean, logvar = self.encoder.encode(pixels / np.float32(127.5) - 1)
    moments = np.concatenate([mean, logvar], axis=-1)
    with np.errstate(over="ignore"):  # looked for below
      moments = moments.astype(self.latent_dtype)
    for i, image in enumerate(batch):
      pair = moments[i], moments[i + len(batch)]
      if not all(np.isfinite(each).all() for each in pair):
        raise UserError(
          f"the VAE {self.encoder.source} gives numbers for {image.name} that"
          f" {self.latent_dtype} cannot hold, or no numbers at all"
        )
      example = dict(zip(dataset_lib.MOMENTS, pair)) | {"id": image.name}
      if self.images.class_names:
        example["label"] = image.label
      yield example

  def _check_skipped(self, name: str, error: Exception) -> None:
    self.skipped.append(name)
    logging.warning("cannot read %s, skipped: %s", name, error)
    self._limit(self.skipped, f" (the last is {name!r}: {error})")

  def _limit(self, skipped: list[str], detail: str = "") -> None:
    total = self.images.num
    if len(skipped) > self.max_bad_fraction * total:
      raise UserError(
        f"{len(skipped)} of the {total} images of {self.images.path} cannot be"
        f" read{detail}, more than"
        f" --max_bad_fraction={self.max_bad_fraction:g} allows"
      )

  def describe(self, reports: list[shards.Report]) -> dict[str, Any]:
    """The metadata, beside what every set of shards has."""
    skipped = [name for report in reports for name in report["skipped"]]
    self._limit(skipped, f" (such as {skipped[0]!r})" if skipped else "")
    if len(skipped) == self.images.num:
      raise UserError(f"no image of {self.images.path} could be read")
    side = self.resolution // self.encoder.down_factor
    return {
      "kind": "latent",
      "latent_shape": [side, side, self.encoder.latent_channels],
      "latent_dtype": self.latent_dtype,
      "image_shape": [self.resolution] * 2 + [self.encoder.in_channels],
      "crop": _CROP,
      "vae_hash": self.encoder.hash,
      "scaling_factor": self.encoder.scaling_factor,
      "num_classes": len(self.images.class_names),
      "class_names": self.images.class_names,
    }
