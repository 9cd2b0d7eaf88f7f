"""The deterministic fill behind the golden model tests, and layout changes."""

import numpy as np


def hfill(key: str, shape: tuple[int, ...], amplitude: float) -> np.ndarray:
  """Pseudo-random float64 values in [-amplitude, amplitude) from a name.

  A 32-bit integer hash of (position, sum of the key's characters), so that
  any language can make the same tensor. C-order, in PyTorch's layout.
  """
  j = np.arange(int(np.prod(shape)), dtype=np.uint64)
  mask = np.uint64(0xFFFFFFFF)
  z = (j + np.uint64(1 + 104729 * sum(key.encode()))) & mask
  for multiplier, shift in (
    (2654435761, 15),
    (2246822519, 13),
    (3266489917, 16),
  ):
    z = (z * np.uint64(multiplier)) & mask
    z = z ^ (z >> np.uint64(shift))
  return (amplitude * (2 * z / 2.0**32 - 1)).reshape(shape)
