"""Numbers as pictures: heat maps, and small images made large."""

import numpy as np

_NOTHING = (200, 200, 200)  # color of NaN
_MARK = (255, 64, 0)


def heat(
  values: np.ndarray, limit: float | None = None, is_signed: bool = False
) -> np.ndarray:
  """[*b] floats -> uint8 [*b, 3].

  Args:
    values: NaN becomes gray.
    limit: value of the brightest color; None for the largest there is.
    is_signed: whether colors go from -limit (blue) over 0 (white) to limit
      (red), and not from 0 (black) to limit (yellow).
  """
  import matplotlib

  values = np.asarray(values, np.float64)
  if limit is None:
    limit = np.nanmax(np.abs(values), initial=0)
  scaled = values / (limit or 1)
  if is_signed:
    scaled = (scaled + 1) / 2
  name = "RdBu_r" if is_signed else "inferno"
  # NaN becomes a color of its own below.
  colors = matplotlib.colormaps[name](np.nan_to_num(scaled), bytes=True)
  is_empty = np.isnan(values)[..., None]
  return np.where(is_empty, np.uint8(_NOTHING), colors[..., :3])


def enlarge(image: np.ndarray, side: int = 320) -> np.ndarray:
  """[h, w, c] with every pixel a square, until the picture has about `side`."""
  zoom = max(1, round(side / max(image.shape[:2])))
  return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def fit(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """[h, w, c] in [shape[0], shape[1], c]: the nearest pixel each."""
  rows, columns = (
    np.arange(new) * old // new for new, old in zip(shape[:2], image.shape)
  )
  return image[rows][:, columns]


def mark(
  image: np.ndarray, token: tuple[int, int], num_tokens: int
) -> np.ndarray:
  """uint8 [h, w, 3] with a frame around the square of one token.

  Args:
    image: uint8 [h, w, 1 or 3].
    token: (row, column) of the token.
    num_tokens: tokens per side of the image.
  """
  image = np.broadcast_to(image, (*image.shape[:2], 3)).copy()
  spans = [
    (side * place // num_tokens, side * (place + 1) // num_tokens)
    for side, place in zip(image.shape, token)
  ]
  (top, bottom), (left, right) = spans
  width = max(1, min(image.shape[:2]) // 100)
  inner = image[top + width : bottom - width, left + width : right - width]
  inner = inner.copy()
  image[top:bottom, left:right] = _MARK
  image[top + width : bottom - width, left + width : right - width] = inner
  return image


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Mean over channels of |a - b|, float [n, h, w], of uint8 [n, h, w, c]."""
  return np.abs(a.astype(np.float64) - b).mean(-1)
