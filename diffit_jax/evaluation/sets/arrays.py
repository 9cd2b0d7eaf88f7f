"""Images that are an array: in memory, or `arr_0` of an npz."""

import dataclasses
import hashlib

import numpy as np

from diffit_jax import npz
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets.image_set import ImageSet, as_rgb

_SHOWN_RANGE = 256  # images whose range an error tells if they are not uint8


def of_npz(
  members: dict[str, npz.Member],
  source: str,
  sha256: str | None = None,
) -> ImageSet:
  """The images of an .npz file that is open.

  Args:
    members: {name: member}.
    source: the file as the user gave it.
    sha256: the hash of the file; None if it is not known yet.

  Raises:
    UserError: no images among the members, or damage.
  """
  if "arr_0" not in members:
    raise UserError(f"{source} {_without_images(members)}")
  what = f"arr_0 of {source}"
  pixels = members["arr_0"].map()
  _check_pixels(pixels, what)
  labels = read_labels(members, len(pixels), source)
  sha256 = sha256 or npz.hash_npz(members)
  images = _of_pixels(pixels, source, "npz", sha256)
  return dataclasses.replace(images, get_labels=lambda: labels)


def of_array(pixels: np.ndarray) -> ImageSet:
  """The images of an array in memory."""
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


def read_labels(
  members: dict[str, npz.Member], num: int, source: str
) -> np.ndarray | None:
  """`arr_1` as int64 [num], or None if there is none."""
  if "arr_1" not in members:
    return None
  member = members["arr_1"]
  if member.shape != (num,) or member.dtype.kind not in "iu":
    raise UserError(
      f"arr_1 of {source} is {member.dtype} {list(member.shape)}, and labels"
      f" are whole numbers, one for each of the {num} images of arr_0"
    )
  return member.load().astype(np.int64)


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
