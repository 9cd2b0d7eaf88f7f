"""Attention with a shared bias, fused for TPU: its matrices stay on the chip.

For one image and head, q, k and v [n, d], n = s^2 tokens numbered along rows:

  S = q k^T / sqrt(d) + B                                 [n, n]        (1)
  P = exp(S - max S) / sum exp(S - max S), by rows                      (2)
  out = P v                                               [n, d]        (3)

  dv = P^T dout,   dP = dout v^T,   dS = P (dP - rowsum(P dP))          (4)
  dq = dS k / sqrt(d),   dk = dS^T q / sqrt(d),   dB = sum_images dS    (5)

B comes from (2s-1)^2 numbers of a table T, read backwards: T'[i, j] =
T[2s-2-i, 2s-2-j]. Spread over the columns of the image alone, these are

  D[c, i s + y] = T'[i, s-1-c+y]   (0 in the last s lanes) [s, 2 s^2]   (6)

and the bias of the s queries in row r of the image is a window of D's lanes:

  B[r s + c, m] = D[c, (s-1-r) s + m]                                   (7)

            0                         lanes                       2 s^2
            +---------------------------------------------------------+
         D  |                                                         |
            +---------------------------------------------------------+
      r = 0                           |<---------- n ---------->|
      r = 1                      |<---------- n ---------->|
    r = s-1 |<---------- n ---------->|

Row c of D is row 0, moved by c lanes: of two lines of 2 s^2 numbers, that are
slices of the table, lane i s + y takes the first where y + c < s and else the
second, and c rolls it to its place (8). So D exists on the chip alone, and so
does its gradient, to which dS is added window by window.

A step of the grid is one head of some images; the heads come in turn, so that
an image's qkv is read once, as the projection left it:

  grid (group of images, step in the group, head)

  queries,    keys m = 0..n-1
  256 at  +---------------------+  S, P, dP, dS: float32, whole rows, so that
  a time  | chunk 0             |  max, sum and rowsum need no second pass
          +---------------------+
          | chunk 1             |  its products overlap the softmax of chunk 0
          +---------------------+

  VMEM: qkv, dout, dqkv [images, n, 3c or c], twice, to move one step's while
  the other's are used; D and d(D) of all heads; of the current head, a copy of
  each for every distance of the windows (7) from a multiple of 128 lanes.

Residuals are (qkv, table), which exist anyway. The backward pass repeats one
product of its five, and finds max, sum and rowsum again from whole rows. A chip
with two cores gives each a group of images, with a d(D) of its own.
"""

import functools

import einops
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from diffit_jax.models.compute import OUTPUT
from diffit_jax.models.kernels import tpu_kernel
from diffit_jax.models.kernels.plain import AttentionShape
from diffit_jax.models.kernels.tpu_kernel import LANES, Sizes

SIDES = (16, 32)  # others leave the windows (7) unaligned, or VMEM too small
IMAGES = 4  # of a step, at most: the program has a copy of the code for each
VMEM_LIMIT = 64 * 2**20  # bytes that the compiler may use
VMEM_BLOCKS = 56 * 2**20  # bytes of a step's blocks and scratch, at most


def attend(
  qkv: jax.Array,
  table: jax.Array,
  num_heads: int,
  window: int,
  interpret: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(d) + B) v in each window, as `kernels.attend`.

  Args:
    qkv: [b, h, w, 3c] queries, keys and values, side by side; each has axes
      (head, d) in c.
    table: [(2 window - 1)^2, heads] relative offsets, float32.
    num_heads: number of heads.
    window: side of the windows, one of SIDES.
    interpret: whether to run without a TPU, slowly.

  Returns:
    [b, h, w, c] of qkv's dtype.
  """
  _, height, width, _ = qkv.shape
  cut = dict(i=height // window, j=width // window, p=window, q=window)
  tokens = einops.rearrange(qkv, "b (i p) (j q) c -> (b i j) (p q) c", **cut)
  out = fused(tokens, table, num_heads, interpret)
  out = einops.rearrange(out, "(b i j) (p q) c -> b (i p) (j q) c", **cut)
  return checkpoint_name(out, OUTPUT)


def refusal(shape: AttentionShape) -> str:
  """What it wants that an attention does not have; "" where it serves it."""
  if shape.bias != "shared":
    found = "one each" if shape.bias == "each" else "none"
    return f"wants one bias for all samples, and {{}} has {found}"
  if shape.tokens not in [side**2 for side in SIDES]:
    allowed = " or ".join(f"{side}x{side}" for side in SIDES)
    return f"wants {allowed} tokens, and an attention has {shape.tokens}"
  if shape.width > LANES:
    return f"wants heads of at most {LANES} channels, and one has {shape.width}"
  side = round(shape.tokens**0.5)
  sizes = Sizes(side, shape.heads, shape.width, images=1, groups=1)
  needed = _vmem_bytes(sizes, jnp.bfloat16)
  if needed > VMEM_BLOCKS:
    return (
      f"wants attention that fits {VMEM_BLOCKS >> 20} MiB on chip, and one with"
      f" {shape.heads} heads of {shape.width} channels has {needed >> 20}"
    )
  return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fused(
  qkv: jax.Array, table: jax.Array, num_heads: int, interpret: bool
) -> jax.Array:
  """(1) to (3) for all images and heads, with the gradients (4) and (5).

  Args:
    qkv: [b, n, 3c] queries, keys and values, side by side; each has axes
      (head, d) in c. bfloat16 or float32, which the products are computed in;
      the rest is float32.
    table: [(2s-1)^2, heads] relative offsets, n = s^2, float32.
    num_heads: number of heads.
    interpret: whether to run without a TPU, slowly.

  Returns:
    [b, n, c] of qkv's dtype.
  """
  return _forward(qkv, table_lines(table), num_heads, interpret)


def _fused_forward(qkv, table, num_heads, interpret):
  return fused(qkv, table, num_heads, interpret), (qkv, table)


def _fused_backward(num_heads, interpret, residuals, dout):
  qkv, table = residuals
  lines, to_table = jax.vjp(table_lines, table)
  dqkv, dlines = _backward(qkv, lines, dout, num_heads, interpret)
  return dqkv, *to_table(dlines)


fused.defvjp(_fused_forward, _fused_backward)


def table_lines(table: jax.Array) -> jax.Array:
  """The two lines of (8): [(2s-1)^2, heads] -> [heads, 2, 2 s^2].

  line[0, i s + y] = T'[i, s-1+y] and line[1, i s + y] = T'[i+1, y-1], with
  zeros outside of T'; row 0 follows upon the last one.
  """
  rows = round(table.shape[0] ** 0.5)
  side = (rows + 1) // 2
  table = einops.rearrange(table[::-1], "(i j) h -> h i j", i=rows)
  table = jnp.pad(table, ((0, 0), (0, 1), (1, 0)))
  both = [table[..., side:], jnp.roll(table, -1, axis=1)[..., :side]]
  return einops.rearrange(both, "line h i y -> h line (i y)")


def _sizes(qkv, num_heads):
  """Sizes with as many images in a step as divide the batch and fit VMEM."""
  batch, tokens, lanes = qkv.shape
  groups = 2 if batch % 2 == 0 else 1
  side, d = round(tokens**0.5), lanes // (3 * num_heads)
  choices = [
    Sizes(side, num_heads, d, images, groups)
    for images in range(IMAGES, 0, -1)
    if batch // groups % images == 0
  ]
  fits = lambda sizes: _vmem_bytes(sizes, qkv.dtype) <= VMEM_BLOCKS
  return next(filter(fits, choices), choices[-1])


def _vmem_bytes(sizes, dtype):
  """Bytes of the backward kernel's blocks and scratch, which has the most."""
  c = sizes.heads * sizes.d
  image = sizes.tokens * 7 * c * jnp.dtype(dtype).itemsize  # qkv, dqkv, dout
  columns = 2 * (sizes.heads + len(sizes.phases)) * np.prod(sizes.columns)
  dk_and_dv = 2 * sizes.tokens * LANES
  return 2 * sizes.images * image + 4 * int(columns + dk_and_dv)


def _forward(qkv, lines, num_heads, interpret):
  """(qkv [b, n, 3c], lines [heads, 2, 2 s^2]) -> out [b, n, c]."""
  sizes, c = _sizes(qkv, num_heads), qkv.shape[2] // 3
  qkv = _pad_lanes(qkv)
  out = jax.ShapeDtypeStruct((*qkv.shape[:2], c + -c % LANES), qkv.dtype)
  image, one_head, _ = _blocks(sizes)
  out = pl.pallas_call(
    functools.partial(tpu_kernel.forward, sizes=sizes),
    name="tmsa_forward",
    grid=_grid(sizes, qkv),
    in_specs=[image(qkv), one_head],
    out_specs=image(out),
    out_shape=out,
    scratch_shapes=_columns_and_copies(sizes),
    cost_estimate=_cost(sizes, 2, lines, qkv, out),
    compiler_params=_PARAMS,
    interpret=interpret,
  )(qkv, lines)
  return out[..., :c]


def _backward(qkv, lines, dout, num_heads, interpret):
  """(as _forward, dout [b, n, c]) -> gradients of qkv and lines."""
  sizes, lanes = _sizes(qkv, num_heads), qkv.shape[2]
  qkv, dout = _pad_lanes(qkv), _pad_lanes(dout)
  dqkv = jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)
  dlines = jax.ShapeDtypeStruct((sizes.groups, *lines.shape), lines.dtype)
  image, one_head, all_heads = _blocks(sizes)
  dk_and_dv = [pltpu.VMEM((sizes.tokens, LANES), jnp.float32)] * 2
  dqkv, dlines = pl.pallas_call(
    functools.partial(tpu_kernel.backward, sizes=sizes),
    name="tmsa_backward",
    grid=_grid(sizes, qkv),
    in_specs=[image(qkv), one_head, image(dout)],
    out_specs=[image(dqkv), all_heads],
    out_shape=[dqkv, dlines],
    scratch_shapes=2 * _columns_and_copies(sizes) + dk_and_dv,
    cost_estimate=_cost(sizes, 5, lines, qkv, dout, dqkv, dlines),
    compiler_params=_PARAMS,
    interpret=interpret,
  )(qkv, lines, dout)
  return dqkv[..., :lanes], dlines.sum(axis=0)


# The groups are independent of each other. D and d(D) go from step to step.
_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "arbitrary", "arbitrary"),
  vmem_limit_bytes=VMEM_LIMIT,
)


def _pad_lanes(x):
  """[b, n, c] -> [b, n, a multiple of 128], zeros after c."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))


def _grid(sizes, qkv):
  steps = qkv.shape[0] // (sizes.groups * sizes.images)
  return sizes.groups, steps, sizes.heads


def _blocks(sizes):
  """Blocks of an array [b, n, lanes], and of lines of one and of all heads."""

  def image(x):
    steps = _grid(sizes, x)[1]
    return pl.BlockSpec(
      (sizes.images, *x.shape[1:]),
      lambda group, step, head: (group * steps + step, 0, 0),
    )

  lines = 2, sizes.columns[1]
  one_head = pl.BlockSpec((1, *lines), lambda group, step, head: (head, 0, 0))
  all_heads = pl.BlockSpec(
    (1, sizes.heads, *lines), lambda group, step, head: (group, 0, 0, 0)
  )
  return image, one_head, all_heads


def _columns_and_copies(sizes):
  """Scratch for D of all heads, and for the copies of one head's."""
  counts = sizes.heads, len(sizes.phases)
  return [pltpu.VMEM((i, *sizes.columns), jnp.float32) for i in counts]


def _cost(sizes, num_products, lines, qkv, *others):
  """Work of products [n, n, d] of the true width, and bytes that are moved.

  Each array is moved once, but lines again for every step's images.
  """
  pairs = qkv.shape[0] * sizes.heads * sizes.tokens**2
  size = lambda x: np.prod(x.shape) * jnp.dtype(x.dtype).itemsize
  groups, steps, _ = _grid(sizes, qkv)
  moved = groups * steps * size(lines) + sum(map(size, (qkv, *others)))
  return pl.CostEstimate(
    flops=2 * num_products * pairs * sizes.d,
    transcendentals=pairs,
    bytes_accessed=int(moved),
  )
