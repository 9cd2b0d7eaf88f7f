"""From uint8 images of any size to the input of the FID Inception.

Two published protocols, each bilinear, per axis, and without antialiasing:

  out[i] = (1 - f) in[lo] + f in[hi]                                     (1)
  lo = floor(src),  hi = min(lo + 1, n_in - 1),  f = src - lo            (2)

  "tf1"          src = i n_in / n_out                                    (3)
                 then (x - 128) / 128
  "pytorch_fid"  src = max((i + 1/2) n_in / n_out - 1/2, 0)              (4)
                 then 2 x / 255 - 1

(3) is TensorFlow 1's ResizeBilinear, a part of the graph of Heusel et al.
(2017), with which Dhariwal and Nichol (2021) and Karras et al. (2022) measured;
(4) has half-pixel centres, as in the PyTorch port. The two give different FIDs,
so numbers compare only within one of them. Parmar et al. (2022) show the effect
of the missing antialiasing.

`jax.image.resize` is not used: it antialiases where it shrinks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import RESIZE_RULES


def check_rule(rule: str) -> None:
  """Raises a UserError unless `rule` is one of RESIZE_RULES."""
  if rule not in RESIZE_RULES:
    raise UserError(
      f"resize={rule!r} is not a rule, only {' or '.join(RESIZE_RULES)}"
    )


def taps(
  n_in: int, n_out: int, rule: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Equations (2) to (4) of one axis.

  Returns:
    lo and hi, both [n_out] ints, and f [n_out] float64.
  """
  i = np.arange(n_out)
  if rule == "tf1":
    src = i * n_in / n_out
  else:
    src = np.maximum((i + 0.5) * n_in / n_out - 0.5, 0)
  lo = np.minimum(np.floor(src).astype(np.int64), n_in - 1)
  return lo, np.minimum(lo + 1, n_in - 1), src - lo


def resize_axis(x: jax.Array, n_out: int, axis: int, rule: str) -> jax.Array:
  """Equation (1) along one axis of a float array, in its own dtype."""
  n_in = x.shape[axis]
  if n_in == n_out:
    return x  # f is 0 everywhere, by either rule
  lo, hi, f = taps(n_in, n_out, rule)
  f = np.expand_dims(f.astype(x.dtype), tuple(range(1, x.ndim - axis)))
  low, high = jnp.take(x, lo, axis), jnp.take(x, hi, axis)
  return low + (high - low) * f


def resize(x: jax.Array, side: int, rule: str) -> jax.Array:
  """Resizes [*b, h, w, c] floats to [*b, side, side, c]."""
  for axis in (x.ndim - 3, x.ndim - 2):
    x = resize_axis(x, side, axis, rule)
  return x


def prepare(images: jax.Array, side: int, rule: str) -> jax.Array:
  """The network's input: resized, and mapped to about [-1, 1].

  Both maps of pixel values are affine, so they commute with (1).

  Args:
    images: [b, h, w, 3] uint8 of any size.
    side: pixels per side of the result.
    rule: one of RESIZE_RULES.

  Returns:
    [b, side, side, 3] float32.
  """
  x = resize(images.astype(jnp.float32), side, rule)
  return (x - 128) / 128 if rule == "tf1" else x * (2 / 255) - 1
