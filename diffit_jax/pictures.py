"""From model outputs to pictures: 8-bit values, grids, PNG files."""

import io
import os

import jax.numpy as jnp
import numpy as np

from diffit_jax import whole
from diffit_jax.errors import UserError

RULES = {  # then clipped to 0..255 and truncated
  "edm": lambda x: x * 127.5 + 128,  # also DiT
  "adm": lambda x: (x + 1) * 127.5,  # DiffiT's release
}


def to_uint8(x, rule: str = "edm"):
  """[..., c] in [-1, 1] -> uint8 by the rule of a published code.

  numpy in, numpy out; a jax array stays on its device.
  """
  if rule not in RULES:
    raise UserError(f"{rule=} is unknown; allowed: {', '.join(RULES)}")
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return RULES[rule](x).clip(0, 255).astype(np.uint8)


def stretched(x: np.ndarray) -> np.ndarray:
  """[h, w, c] floats as uint8 from least to greatest, with 1 or 3 channels."""
  x = x[..., :3] if x.shape[-1] >= 3 else x[..., :1]
  x = (x - x.min()) / max(float(np.ptp(x)), 1e-12)
  return (255 * x).astype(np.uint8)


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
  """[n, h, w, c] -> [rows h, columns w, c], along rows; gaps are 0."""
  images = np.asarray(images)
  n, h, w, c = images.shape
  rows = -(-n // columns)
  cells = np.zeros((rows * columns, h, w, c), images.dtype)
  cells[:n] = images
  cells = cells.reshape(rows, columns, h, w, c).swapaxes(1, 2)
  return cells.reshape(rows * h, columns * w, c)


def page(images: np.ndarray, columns: int | None = None) -> np.ndarray:
  """A grid to look at: near square, with gaps, small images enlarged.

  Args:
    images: uint8 [n, h, w, c].
    columns: images per row; None for the square.

  Returns:
    uint8 [H, W, c], black between the images.
  """
  n, h, w, _ = images.shape
  zoom = max(1, 32 // h)
  images = np.asarray(images).repeat(zoom, axis=1).repeat(zoom, axis=2)
  gap = max(2, zoom * h // 32)
  images = np.pad(images, ((0, 0), (0, gap), (0, gap), (0, 0)))
  grid = image_grid(images, columns or int(np.ceil(np.sqrt(n))))
  return np.pad(grid, ((gap, 0), (gap, 0), (0, 0)))


def to_image(image: np.ndarray):
  """[h, w, 1 or 3] uint8 as an image of PIL."""
  from PIL import Image

  image = np.asarray(image)
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def to_png(image: np.ndarray) -> bytes:
  """[h, w, 1 or 3] uint8 as the content of a PNG file."""
  buffer = io.BytesIO()
  to_image(image).save(buffer, format="PNG")
  return buffer.getvalue()


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
  """Writes [h, w, 1 or 3] uint8; a file under `path` is never a partial one."""
  png = to_png(image)
  with whole.writing(path) as partial:
    partial.write_bytes(png)
