"""Images to be scored, or to be compared with: one form for all sources.

  array     uint8 [n, h, w, 3 or 1]
  npz       `arr_0` of that kind, and labels `arr_1` [n] where there are any
            (ADM's sample files); `arr_0` stays on disk
  folder    PNG, JPEG or WebP files; of a folder that `sample` wrote, its
            `images` in the order of their numbers, labels from its npz
  zip       the same in an archive (EDM's layout, labels in dataset.json)
  dataset   a prepared data set of images, by its name

Gray is repeated to three channels; alpha in files is dropped, as everywhere
(`data.transforms`). Images must be of one size: they are scored as they are.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any, TypeVar
import zipfile

from absl import logging
import numpy as np
from PIL import Image

from diffit_jax import npz
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import records, sources, transforms
from diffit_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
# What reading an image raises: decoding, and a damaged or strange zip member.
_UNREADABLE = transforms.UNREADABLE + (
  zipfile.BadZipFile,
  NotImplementedError,
  RuntimeError,
)
SAMPLING_FILE = "sampling.json"  # what `sample` says of its settings
_HASHED_BYTES = 1 << 30  # folders up to this size are read once when opened
_NUM_THREADS = min(8, os.cpu_count() or 1)
_FEW = 8  # images; fewer are decoded without threads
_SHOWN_RANGE = 256  # images whose range is told where they are no uint8


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """A set of images.

  Attributes:
    num: of images.
    shape: (height, width) of each.
    read: from indices [k], uint8 [k, h, w, 3] of one's own; any order, from any
      thread; raises a UserError that names an image which cannot be read.
    about: for a card, in JSON's types: "source" as it was given, "kind", "num",
      and what identifies the pixels: "sha256" of a file or an array,
      "content_hash" over the names and bytes of files, or where these are too
      many "listing_hash" over names and sizes; of a data set the
      "content_hash" that `prepare` wrote down.
    sampling: the settings that `sample` wrote beside the images, or {}.
    get_labels: see `labels`; called once.
  """

  num: int
  shape: tuple[int, int]
  read: Callable[[np.ndarray], np.ndarray]
  about: dict[str, Any]
  sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
  get_labels: Callable[[], np.ndarray | None] = lambda: None

  @functools.cached_property
  def labels(self) -> np.ndarray | None:
    """int64 [num], or None; of a data set, this reads all its records."""
    return self.get_labels()


def open_images(
  where: str | os.PathLike | np.ndarray,
  data_dir: str | None = None,
  split: str = "train",
) -> Images:
  """Opens what can be scored.

  Args:
    where: an array, a path or the name of a data set (see the module); a path
      that exists wins over a data set of that name.
    data_dir: of data sets; None stands for $TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    split: of a data set.

  Raises:
    UserError: nothing of that name, or no images of one size in 8 bits.
  """
  if isinstance(where, np.ndarray):
    return _of_array(where)
  path = pathlib.Path(where).expanduser()
  if path.is_dir():
    if dataset_lib.find_directory(path.name, str(path.parent)):
      return _of_dataset(path.name, str(path.parent), split, str(where))
    return _of_folder(path, str(where))
  if not path.exists():
    name, data_dir = str(where), data_dir or dataset_lib.default_data_dir()
    if dataset_lib.find_directory(name, data_dir) is None:
      raise UserError(
        f"there is no file or folder {name}, and no prepared data set {name!r}"
        f" in {data_dir}"
      )
    return _of_dataset(name, data_dir, split, name)
  if npz.is_npz(path):
    return from_npz(npz.open_npz(path), path, str(where))
  return _of_files(_open_source(path), "zip", str(where))


def from_npz(
  members: dict[str, npz.Member],
  path: pathlib.Path,
  source: str,
  sha256: str | None = None,
) -> Images:
  """The images of an .npz file that is open.

  Args:
    members: by name.
    path: of the file.
    source: the file as the user gave it.
    sha256: of the file; None where it is not known yet.

  Raises:
    UserError: no images among the members, or damage.
  """
  if "arr_0" not in members:
    raise UserError(f"{source} {_without_images(members)}")
  what = f"arr_0 of {source}"
  pixels = members["arr_0"].map()
  _check_pixels(pixels, what)
  labels = _read_labels(members, len(pixels), source)
  about = {"source": source, "kind": "npz", "num": len(pixels)}
  about["sha256"] = sha256 or npz.hash_npz(members)
  return Images(
    num=len(pixels),
    shape=pixels.shape[1:3],
    read=lambda index: _as_rgb(pixels[np.asarray(index, int)]),
    about=about,
    sampling=_read_sampling(path.parent),
    get_labels=lambda: labels,
  )


class Guard:
  """Looks for images that no sampler and no camera makes.

  An image of one colour is what NaN becomes in 8 bits; a set that never exceeds
  1 was in [0, 1] when it was cast to 8 bits.

  Attributes:
    constant: indices of the images of one colour.
    maximum: over all values; -1 where nothing was seen.
  """

  def __init__(self, what: str, refuse: bool = True):
    """Begins.

    Args:
      what: the set's name, for messages.
      refuse: whether images of one colour are an error; real data may hold
        some, and then a warning tells how many. A maximum of 1 is always one.
    """
    self._what, self._refuse = what, refuse
    self.constant: set[int] = set()
    self.maximum = -1

  def see(self, images: np.ndarray, index: np.ndarray | int) -> None:
    """Takes in some images; the same one may come again.

    Args:
      images: uint8 [k, h, w, c].
      index: [k], of each image in the set; or of the first, where the others
        follow it.

    Raises:
      UserError: some are of one colour, and that is refused.
    """
    if not len(images):
      return
    self.maximum = max(self.maximum, int(images.max()))
    is_constant = (images == images[:, :1, :1]).all(axis=(1, 2, 3))
    if not is_constant.any():
      return
    index = np.asarray(index)
    index = index if index.ndim else index + np.arange(len(images))
    found = sorted(set(index[is_constant].tolist()))
    self.constant.update(found)
    if self._refuse:
      colour = images[is_constant.argmax(), 0, 0].tolist()
      raise UserError(
        f"image {found[0]} of {self._what} is of one colour, {colour},"
        f" throughout ({len(found)} of the {len(images)} images that were read"
        " with it are): NaN becomes that in 8 bits, so look at what made them"
      )

  def finish(self) -> None:
    """The set is through.

    Raises:
      UserError: no value of it exceeds 1.
    """
    if 0 <= self.maximum <= 1:
      raise UserError(
        f"no value in the images of {self._what} exceeds {self.maximum}: they"
        " were in [0, 1] when they were cast to 8 bits, or are black; scale"
        " them to 0..255 before the cast"
      )
    if self.constant:
      logging.warning(
        "%d images of %s are of one colour throughout, the first being %d",
        len(self.constant),
        self._what,
        min(self.constant),
      )


def _of_array(pixels: np.ndarray) -> Images:
  _check_pixels(pixels, "the array")
  digest = hashlib.sha256(str(pixels.shape).encode())
  for image in pixels:
    digest.update(np.ascontiguousarray(image))
  about = {"source": "array", "kind": "array", "num": len(pixels)}
  return Images(
    num=len(pixels),
    shape=pixels.shape[1:3],
    read=lambda index: _as_rgb(pixels[np.asarray(index, int)]),
    about=about | {"sha256": digest.hexdigest()},
  )


def _of_folder(folder: pathlib.Path, given: str) -> Images:
  """A folder that `sample` wrote, its `images`, or a folder of any images."""
  is_inner = folder.resolve().name == "images"
  run = folder.resolve().parent if is_inner else folder
  if not (run / SAMPLING_FILE).exists():
    return _of_files(_open_source(folder), "folder", given)
  folder = run / "images"
  if not folder.is_dir():
    has_latents = (run / "latents").is_dir()
    raise UserError(
      f"{given} holds latents, no images: sample with the decoder"
      if has_latents
      else f"{given} holds no images: sampling into it has not begun"
    )
  source = _open_source(folder, use_labels=False)
  # Longer numbers last: beyond a million they have more digits than the others.
  names = sorted(source.sizes, key=lambda name: (len(name), name))
  source = dataclasses.replace(
    source, sizes={name: source.sizes[name] for name in names}
  )
  return dataclasses.replace(
    _of_files(source, "folder", given),
    sampling=_read_sampling(run),
    get_labels=lambda: _labels_of_run(run, len(names)),
  )


def _open_source(path: pathlib.Path, use_labels: bool = True) -> sources.Source:
  try:
    return sources.open_source(str(path), use_labels)
  except UserError as error:  # which speaks of the flag of another command
    raise UserError(str(error).replace("--source=", "", 1)) from error


def _of_files(source: sources.Source, kind: str, given: str) -> Images:
  """The images of a listed folder or zip file."""
  names = list(source.sizes)
  first = _decode(source, names[0], None)
  shape = first.shape[:2]
  decode = lambda name: _decode(source, name, (names[0], shape))
  labels = None
  if source.labels:
    labels = np.array([source.labels[name] for name in names], np.int64)
  about = {"source": given, "kind": kind, "num": len(names)}
  return Images(
    num=len(names),
    shape=shape,
    read=lambda index: _stack(_map(decode, [names[i] for i in index]), shape),
    about=about | _identify(source, names[0], shape),
    get_labels=lambda: labels,
  )


def _decode(
  source: sources.Source,
  name: str,
  first: tuple[str, tuple[int, int]] | None,
) -> np.ndarray:
  """Image of a source -> uint8 [h, w, 3]; `first`: name and size to match."""
  try:
    pixels = np.asarray(transforms.open_image(source.read(name)))
  except _UNREADABLE as error:
    raise _unreadable(source, name, error) from error
  if first:
    _check_size(source, name, pixels.shape[:2], *first)
  return pixels


def _unreadable(source, name: str, error: Exception) -> UserError:
  return UserError(
    f"{source.path}: the image {name!r} cannot be read ({error}): remove or"
    " replace it"
  )


def _check_size(source, name, shape, first_name, first_shape) -> None:
  if shape != first_shape:
    raise UserError(
      f"{source.path} holds images of different sizes: {first_name!r} is"
      f" {_size(first_shape)} and {name!r} {_size(shape)}; bring them to one"
      " size with: python -m diffit_jax.prepare image_folder"
      f" --source={source.path} --resolution=SIDE"
    )


def _size(shape: tuple[int, int]) -> str:
  return f"{shape[1]} wide and {shape[0]} high"


def _identify(
  source: sources.Source, first_name: str, shape: tuple[int, int]
) -> dict[str, str]:
  """What tells the source from others; small ones are read, sizes compared."""
  if sum(source.sizes.values()) > _HASHED_BYTES:
    return {"listing_hash": source.listing_hash()}
  digest = hashlib.sha256()
  for name in source.sizes:
    try:
      data = source.read(name)
      with Image.open(io.BytesIO(data), formats=transforms.FORMATS) as image:
        width, height = image.size
    except _UNREADABLE as error:
      raise _unreadable(source, name, error) from error
    _check_size(source, name, (height, width), first_name, shape)
    digest.update(f"{name!r} {len(data)} ".encode())
    digest.update(data)
  return {"content_hash": digest.hexdigest()}


def _of_dataset(name: str, data_dir: str, split: str, given: str) -> Images:
  dataset = dataset_lib.open_dataset(name, data_dir, split)
  if dataset.kind != "image":
    raise UserError(
      f"the data set {dataset.directory} holds latents, no images: give the"
      " images that they were made from"
    )
  about = {
    "source": given,
    "kind": "dataset",
    "num": dataset.num_images,
    "name": name,
    "split": split,
    "content_hash": dataset.metadata.get("content_hash"),
  }
  shape = dataset.image_shape[:2]
  return Images(
    num=dataset.num_images,
    shape=shape,
    read=lambda index: _stack(_read_records(dataset, index), shape),
    about=about,
    get_labels=lambda: _labels_of_dataset(dataset),
  )


def _read_records(
  dataset: dataset_lib.Dataset, index: np.ndarray
) -> list[np.ndarray]:
  def decode(record: dict[str, Any]) -> np.ndarray:
    try:
      return transforms.decode(record["image"], dataset.image_shape[-1])
    except _UNREADABLE as error:
      raise records.damage(dataset.directory, error) from error

  found = dataset.source.__getitems__(np.asarray(index).tolist())
  return [_as_rgb(image) for image in _map(decode, found)]


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


def _read_sampling(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / SAMPLING_FILE
  try:
    settings = json.loads(path.read_text()) if path.exists() else {}
  except (OSError, ValueError) as error:
    logging.warning("%s is damaged (%s): passed over", path, error)
    return {}
  return settings if isinstance(settings, dict) else {}


def _without_images(members: dict[str, npz.Member]) -> str:
  """What to say of an npz without arr_0."""
  if not members:
    return "is empty: images are its arr_0"
  if "mu" in members:
    return "holds statistics (mu, sigma), no images: images are an npz's arr_0"
  return f"holds no arr_0, where images are, but {', '.join(sorted(members))}"


def _check_pixels(pixels: np.ndarray, what: str) -> None:
  """Refuses whatever is not uint8 [n, h, w, 3 or 1] with n, h, w > 0."""
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


def _as_rgb(images: np.ndarray) -> np.ndarray:
  """[..., 3 or 1] -> [..., 3]."""
  return images if images.shape[-1] == 3 else images.repeat(3, axis=-1)


def _stack(images: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Images [h, w, 3] -> [k, h, w, 3]; k may be 0."""
  return np.array(images, np.uint8).reshape(len(images), *shape, 3)


def _map(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
  """Applies a function that lets go of the interpreter, in a few threads."""
  if len(items) < _FEW or _NUM_THREADS == 1:
    return [function(item) for item in items]
  with futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(pool.map(function, items))
