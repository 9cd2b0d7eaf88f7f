"""Image decoding and the two published resizing rules, in numpy and Pillow.

Resizing rules (both work on RGB or gray 8-bit images):

  edm          one LANCZOS resize straight to S x S, as EDM's dataset tool does
               without a transform; an image that is already S x S stays as it
               is. An image that is not square is stretched.
  center-crop  the middle square of the short side first, then as `edm`; the
               same thing for square images.
  adm          halve with BOX while the short side is at least 2 S, resize the
               short side to S with BICUBIC, crop the middle (ADM, DiT).

TensorFlow's image operations do not reproduce either bit for bit.
"""

from collections.abc import Callable
import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

CROPS = ("edm", "center-crop", "adm")
ENCODINGS = ("png", "raw")  # of the images in a prepared data set
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 89_478_485  # Pillow's own line for a decompression bomb
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (  # the chunks that pixels are made from; all others describe
  *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"),
  *(b"acTL", b"fcTL", b"fdAT"),  # of frames
)
# What Pillow raises for bytes that are no image, or a damaged one.
UNREADABLE = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  MemoryError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)


def open_image(data: bytes | np.ndarray, channels: int = 3) -> Image.Image:
  """Decodes a PNG, JPEG or WebP file to 8-bit RGB or gray.

  Palette, gray and CMYK images are converted, 16-bit gray keeps its high byte.
  CHOICE: alpha is dropped and an EXIF rotation ignored, as ADM and EDM do, so
  that statistics of the images compare with theirs. What `notes` tells of an
  image is in its `info`.

  Args:
    data: the file, or the pixels as `decode` gives them.
    channels: 3 for RGB, 1 for gray.

  Raises:
    One of `UNREADABLE`: no such image, damaged, or above `MAX_PIXELS`.
  """
  if isinstance(data, np.ndarray):
    image, is_sound = as_image(data), True
  else:
    image, is_sound = _past_metadata(_load, data)
  info = {
    "num_frames": getattr(image, "n_frames", 1),
    "exif_orientation": _orientation(image) if is_sound else None,
  }
  if image.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
    high_byte = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
    image = Image.fromarray(high_byte)
  image = image.convert("RGB" if channels == 3 else "L")
  image.info = info
  return image


def notes(image: Image.Image) -> list[str]:
  """What the user should know of an image from `open_image`.

  Each is the end of a sentence that begins with "some images ...".
  """
  found = []
  orientation = image.info["exif_orientation"]
  if orientation is None:
    found.append("have metadata that cannot be read and is passed over")
  elif orientation != 1:
    found.append("carry an EXIF rotation, which is ignored")
  if image.info["num_frames"] > 1:
    found.append("hold several frames, of which the first is taken")
  return found


def read_size(data: bytes) -> tuple[int, int]:
  """Width and height of an image file, without its pixels.

  Raises:
    One of `UNREADABLE`.
  """
  image, _ = _past_metadata(_open, data)
  return image.size


def decode(data: bytes | np.ndarray, channels: int) -> np.ndarray:
  """Encoded image -> [h, w, channels] uint8; the hot path of the pipeline.

  Pixels, the `raw` encoding, stay as they are.
  """
  if isinstance(data, np.ndarray):
    return data
  image = _open(data).convert("RGB" if channels == 3 else "L")
  return np.asarray(image).reshape(image.height, image.width, channels)


def _past_metadata(
  read: Callable[[bytes], Image.Image], data: bytes
) -> tuple[Image.Image, bool]:
  """The image of a file, and whether it could be read as it is.

  A PNG is read without its metadata where it cannot be read with it.
  """
  try:
    return read(data), True
  except UNREADABLE as error:
    try:
      return read(_without_metadata(data)), False
    except UNREADABLE:
      raise error from None


def _without_metadata(data: bytes) -> bytes:
  """A PNG file of nothing but pixels; b"" of another file."""
  if not data.startswith(_PNG_SIGNATURE):
    return b""
  kept, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
  while start < len(data):
    length, kind = struct.unpack_from(">I4s", data, start)
    end = start + length + 12  # its length, kind and check sum
    if kind in _PNG_PIXELS:
      kept.append(data[start:end])
    start = end
  return b"".join(kept)


def _orientation(image: Image.Image) -> int | None:
  """1 to 8 by EXIF; 1 where it says nothing of use, None if it is damaged."""
  try:
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
  except Exception:  # Pillow has no class of errors for damaged EXIF
    return None
  if not isinstance(orientation, int):
    return None
  return orientation if 1 <= orientation <= 8 else 1


def _load(data: bytes) -> Image.Image:
  image = _open(data)
  if image.width * image.height > MAX_PIXELS:
    raise ValueError(f"{image.width}x{image.height} pixels are too many")
  image.load()
  return image


def _open(data: bytes) -> Image.Image:
  try:
    return Image.open(io.BytesIO(data), formats=FORMATS)
  except UnidentifiedImageError:
    raise ValueError("no PNG, JPEG or WebP image") from None


def encode_png(image: Image.Image | np.ndarray) -> bytes:
  """8-bit image, as Pillow or [h, w, 1 or 3] uint8, -> a PNG file."""
  if isinstance(image, np.ndarray):
    image = as_image(image)
  file = io.BytesIO()
  image.save(file, format="PNG")
  return file.getvalue()


def as_image(pixels: np.ndarray) -> Image.Image:
  """[h, w, 1 or 3] uint8 -> Pillow's image, gray or RGB."""
  return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def resize_edm(image: Image.Image, resolution: int) -> Image.Image:
  """One LANCZOS resize to `resolution` x `resolution` (EDM's dataset tool)."""
  if image.size == (resolution, resolution):
    return image
  return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def center_square(image: Image.Image) -> Image.Image:
  """The middle square of the short side (EDM's `center-crop`)."""
  width, height = image.size
  side = min(width, height)
  left, top = (width - side) // 2, (height - side) // 2
  return image.crop((left, top, left + side, top + side))


def center_crop_adm(image: Image.Image, resolution: int) -> Image.Image:
  """ADM's centre crop to `resolution` x `resolution`."""
  while min(image.size) >= 2 * resolution:
    size = tuple(side // 2 for side in image.size)
    image = image.resize(size, Image.Resampling.BOX)
  scale = resolution / min(image.size)
  size = tuple(round(side * scale) for side in image.size)
  image = image.resize(size, Image.Resampling.BICUBIC)
  left, top = ((side - resolution) // 2 for side in image.size)
  return image.crop((left, top, left + resolution, top + resolution))


def fit(image: Image.Image, resolution: int, crop: str) -> Image.Image:
  """Brings an image to `resolution` x `resolution` by one of `CROPS`."""
  if crop == "adm":
    return center_crop_adm(image, resolution)
  if crop == "center-crop":
    image = center_square(image)
  return resize_edm(image, resolution)


def flip(image: np.ndarray) -> np.ndarray:
  """Mirrors [..., h, w, c] left to right."""
  return image[..., ::-1, :]


_EXIF_ORIENTATION = 0x0112
