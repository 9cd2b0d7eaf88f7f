"""Bodies of the kernels of `tpu`: one head of some images, in VMEM.

Equations are numbered as there. Refs are blocks of a step:

  qkv_ref, dqkv_ref    [images, n, 3c padded to 128 lanes]
  dout_ref, out_ref    [images, n, c padded to 128 lanes]
  lines_ref            [1, 2, 2 s^2] of the head
  dlines_ref           [1, heads, 2, 2 s^2], of the group of images
  columns_ref          [heads, s, 2 s^2] float32: D; dcolumns_ref: d(D)
  copies_ref           [phases, s, 2 s^2] float32: D of the head, moved so that
                       the windows (7) start at a multiple of 128 lanes;
                       dcopies_ref: its gradient
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

LANES = 128  # of a register; slices of an array start and end at multiples
QUERIES = 256  # rows of S computed at a time


class Sizes(NamedTuple):
  """Sizes that the kernels are built for.

  Attributes:
    side: s, rows of the square of tokens.
    heads: number of heads.
    d: width of a head.
    images: images in one step of the grid.
    groups: parts of the batch, which two cores of a chip share.
  """

  side: int
  heads: int
  d: int
  images: int
  groups: int

  @property
  def tokens(self) -> int:
    return self.side**2

  @property
  def columns(self) -> tuple[int, int]:
    """Shape of D of one head."""
    return self.side, 2 * self.tokens

  @property
  def phases(self) -> list[int]:
    """Distances of the windows (7) from a multiple of 128 lanes."""
    return sorted({row * self.side % LANES for row in range(self.side)})

  def window(self, row: int) -> tuple[int, slice]:
    """Index of the phase of image row `row`, and its lanes in that copy."""
    start = (self.side - 1 - row) * self.side
    phase = start % LANES
    lanes = slice(start - phase, start - phase + self.tokens)
    return self.phases.index(phase), lanes


def forward(qkv_ref, lines_ref, out_ref, columns_ref, copies_ref, *, sizes):
  """(1) to (3)."""
  head = pl.program_id(2)
  _prepare_bias(lines_ref, columns_ref, copies_ref, sizes)
  keys_values = functools.cache(
    lambda image: _keys_values(qkv_ref, image, head, sizes)
  )

  def logits(image, rows):
    q = _query(qkv_ref, image, rows, head, sizes)
    return _dot(q, keys_values(image)[0], (1, 1))

  def weights(image, rows, products):
    return _softmax(products + _bias(copies_ref, rows, sizes))

  def output(image, rows, p_and_total):
    p, total = p_and_total
    v = keys_values(image)[1]
    out = _dot(p.astype(v.dtype), v, (1, 0)) / total
    _put(out_ref, image, rows, head * sizes.d, out, sizes.d)

  _in_stages(sizes, logits, weights, output)


def backward(
  qkv_ref, lines_ref, dout_ref, dqkv_ref, dlines_ref, columns_ref,
  copies_ref, dcolumns_ref, dcopies_ref, dk_ref, dv_ref, *, sizes,
):  # fmt: skip
  """(4) and (5), after (1) and (2) once more."""
  head, d, dtype = pl.program_id(2), sizes.d, qkv_ref.dtype
  _prepare_bias(lines_ref, columns_ref, copies_ref, sizes)
  dcopies_ref[...] = jnp.zeros_like(dcopies_ref)
  keys_values = functools.cache(
    lambda image: _keys_values(qkv_ref, image, head, sizes)
  )

  def logits(image, rows):
    k, v = keys_values(image)
    q = _query(qkv_ref, image, rows, head, sizes)
    dout = _take(dout_ref, image, rows, head * d, d).astype(dtype)
    return q, dout, _dot(q, k, (1, 1)), _dot(dout, v, (1, 1))

  def softmax(image, rows, begun):
    q, dout, products, dp = begun
    p, total = _softmax(products + _bias(copies_ref, rows, sizes))
    p = p / total
    ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True))
    _add_bias_gradient(dcopies_ref, rows, ds, sizes)
    return q, dout, p.astype(dtype), ds.astype(dtype)

  def gradients(image, rows, begun):
    q, dout, p, ds = begun
    dq = _dot(ds, keys_values(image)[0], (1, 0)) * _scale(d, dtype)
    _put(dqkv_ref, image, rows, head * d, dq, d)
    dk, dv = _dot(ds, q, (0, 0)), _dot(p, dout, (0, 0))
    if rows.start > 0:
      dk, dv = dk + dk_ref[...], dv + dv_ref[...]
    if rows.stop < sizes.tokens:
      dk_ref[...], dv_ref[...] = dk, dv
      return
    every = slice(0, sizes.tokens)
    _put(dqkv_ref, image, every, (sizes.heads + head) * d, dk, d)
    _put(dqkv_ref, image, every, (2 * sizes.heads + head) * d, dv, d)

  _in_stages(sizes, logits, softmax, gradients)
  _finish_bias(dcopies_ref, dcolumns_ref, dlines_ref, sizes)


def _in_stages(sizes, *stages):
  """Runs the stages for all images and chunks, each with its last result.

  Stage i of a chunk stands before stage i + 1 of the chunk before: the compiler
  mostly keeps this order, and has products to do while a softmax waits.
  """
  chunks = [
    (image, slice(start, start + QUERIES))
    for image in range(sizes.images)
    for start in range(0, sizes.tokens, QUERIES)
  ]
  results = [()] * len(chunks)
  for time in range(len(chunks) + len(stages) - 1):
    for i, stage in enumerate(stages):
      at = time - i
      if 0 <= at < len(chunks):
        results[at] = (stage(*chunks[at], *results[at]),)


def _query(qkv_ref, image, rows, head, sizes):
  q = _take(qkv_ref, image, rows, head * sizes.d, sizes.d)
  return (q * _scale(sizes.d, qkv_ref.dtype)).astype(qkv_ref.dtype)


def _keys_values(qkv_ref, image, head, sizes):
  """k and v [n, 128] of qkv's dtype, zeros from lane d on."""
  every = slice(0, sizes.tokens)
  offsets = [(part * sizes.heads + head) * sizes.d for part in (1, 2)]
  take = lambda offset: _take(qkv_ref, image, every, offset, sizes.d)
  return [take(offset).astype(qkv_ref.dtype) for offset in offsets]


def _scale(d, dtype):
  """1 / sqrt(d), rounded to the products' dtype, as `plain` does."""
  return float(np.asarray(d**-0.5, dtype))


def _softmax(logits):
  """(2) before the division: exp(S - max S), and its sum by rows."""
  p = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return p, jnp.sum(p, axis=1, keepdims=True)


def _dot(a, b, axes):
  """Product of two matrices over an axis of each, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision="highest" if a.dtype == jnp.float32 else "default",
    preferred_element_type=jnp.float32,
  )


def _take(ref, image, rows, offset, d):
  """[rows, 128] float32: the d lanes from `offset`, then zeros."""
  (first, second), before = _aligned(offset, ref.shape[2])
  to_front = jax.lax.bitwise_and(LANES - before, LANES - 1)

  def load(lanes):
    return pltpu.roll(ref[image, rows, lanes].astype(jnp.float32), to_front, 1)

  first, second = load(first), load(second)
  lane = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
  x = jnp.where(lane < LANES - before, first, second)
  return jnp.where(lane < d, x, 0.0)


def _put(ref, image, rows, offset, x, d):
  """Writes d lanes of x [rows, 128] to the lanes from `offset`."""
  (first, second), before = _aligned(offset, ref.shape[2])
  x = pltpu.roll(x, before, 1)
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  in_first = (lane >= before) & (lane < before + d)
  for lanes, mask in (first, in_first), (second, lane < before + d - LANES):
    old = ref[image, rows, lanes].astype(jnp.float32)
    ref[image, rows, lanes] = jnp.where(mask, x, old).astype(ref.dtype)


def _aligned(offset, width):
  """Two registers that hold 128 lanes from `offset`, and what comes before.

  A head of width 72 starts at any lane, a slice only at a multiple of 128: the
  head is rolled to lane 0. At the end of a row the second register is the first
  again, which then holds all of the head. The index is traced: // and % of it
  would not compile without a TPU (for the sign they ask the default device).
  """
  start = jax.lax.bitwise_and(offset, -LANES)
  second = jnp.minimum(start + LANES, width - LANES)
  lanes = [pl.ds(pl.multiple_of(i, LANES), LANES) for i in (start, second)]
  return lanes, offset - start


def _prepare_bias(lines_ref, columns_ref, copies_ref, sizes):
  """Makes (8) of a head once for all images, and the copies for the windows."""
  head = pl.program_id(2)

  @pl.when(pl.program_id(1) == 0)
  def _():
    first, second = lines_ref[0, 0:1, :], lines_ref[0, 1:2, :]
    lines = jnp.where(_takes_first(sizes), first, second)
    columns_ref[head] = _shear(lines, sizes.side, 1)

  columns = columns_ref[head]
  for i, phase in enumerate(sizes.phases):
    copies_ref[i] = _roll(columns, -phase)


def _finish_bias(dcopies_ref, dcolumns_ref, dlines_ref, sizes):
  """Transpose of `_prepare_bias`; ends with the last images."""
  step, head = pl.program_id(1), pl.program_id(2)
  total = sum(
    _roll(dcopies_ref[i], phase) for i, phase in enumerate(sizes.phases)
  )

  @pl.when(step == 0)
  def _():
    dcolumns_ref[head] = total

  @pl.when(step > 0)
  def _():
    dcolumns_ref[head] += total

  @pl.when(step == pl.num_programs(1) - 1)
  def _():
    x, mask = _shear(dcolumns_ref[head], sizes.side, -1), _takes_first(sizes)
    first, second = jnp.where(mask, x, 0.0), jnp.where(mask, 0.0, x)
    dlines_ref[0, head, 0:1, :] = jnp.sum(first, axis=0, keepdims=True)
    dlines_ref[0, head, 1:2, :] = jnp.sum(second, axis=0, keepdims=True)


def _takes_first(sizes):
  """[s, 2 s^2]: whether y + c < s, in row c and lane i s + y."""
  row = jax.lax.broadcasted_iota(jnp.int32, sizes.columns, 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, sizes.columns, 1)
  return row + jax.lax.bitwise_and(lane, sizes.side - 1) < sizes.side


def _shear(x, side, sign):
  """Moves row c of x by sign * c lanes, c < side: one roll per bit of c."""
  row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  for bit in [2**i for i in range(side.bit_length() - 1)]:
    is_set = jax.lax.bitwise_and(row, bit) > 0
    x = jnp.where(is_set, _roll(x, sign * bit), x)
  return x


def _roll(x, lanes):
  """x with its rows moved to the right, around the end."""
  return pltpu.roll(x, lanes % x.shape[1], 1) if lanes else x


def _bias(copies_ref, rows, sizes):
  """(7) of all keys: B[rows] [256, n]."""
  first, last = rows.start // sizes.side, rows.stop // sizes.side
  windows = [sizes.window(row) for row in range(first, last)]
  parts = [copies_ref[phase, :, lanes] for phase, lanes in windows]
  return jnp.concatenate(parts, axis=0)


def _add_bias_gradient(dcopies_ref, rows, ds, sizes):
  """Transpose of `_bias`."""
  first = rows.start // sizes.side
  for i, part in enumerate(jnp.split(ds, QUERIES // sizes.side)):
    phase, lanes = sizes.window(first + i)
    dcopies_ref[phase, :, lanes] += part
