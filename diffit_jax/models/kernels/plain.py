"""Attention, equation (6), as XLA compiles it; it serves everything.

  softmax(q k^T / sqrt(d) + B) v,   the softmax in float32

B is spread from a table of relative offsets. Windows are cut out of the map
first; tokens of different windows do not see each other.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp


class AttentionShape(NamedTuple):
  """One kind of attention in a network, as far as a kernel needs to know.

  Attributes:
    tokens: number that attend to each other.
    heads: number of heads.
    width: width of one head.
    bias: "shared" by all samples, "each" has one, or "none".
  """

  tokens: int
  heads: int
  width: int
  bias: str


# (q, k, v [*b, heads, n, d], bias [heads, n, n], [b, 1, heads, n, n] or None)
# -> [*b, heads, n, d] of v's dtype.
HeadsAttention = Callable[..., jax.Array]


def by_heads(attend: HeadsAttention) -> Callable[..., jax.Array]:
  """The `Kernel.attend` that cuts windows and heads, and joins them again."""

  def attend_map(qkv, table, num_heads, window):
    q, k, v, bias = heads_of(qkv, table, num_heads, window)
    return einops.rearrange(
      attend(q, k, v, bias),
      "b (i j) h (p q) d -> b (i p) (j q) (h d)",
      i=qkv.shape[1] // window,
      p=window,
    )

  return attend_map


def heads_of(
  qkv: jax.Array, table: jax.Array | None, num_heads: int, window: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
  """(q, k, v, bias) of (6), for each window and head.

  Args:
    qkv: [b, h, w, 3c] queries, keys and values, side by side.
    table: [(2 window - 1)^2, heads] of the bias, [b, ...] of one for each
      sample, or None for no bias.
    num_heads: number of heads.
    window: side of the windows.

  Returns:
    q, k and v [b, windows, heads, n, d]; bias [heads, n, n] or
    [b, 1, heads, n, n], or None.
  """
  cut = lambda x: einops.rearrange(
    x,
    "b (i p) (j q) (h d) -> b (i j) h (p q) d",
    h=num_heads,
    p=window,
    q=window,
  )
  # Cut, then rearranged: so the gradients are joined, not padded and added.
  q, k, v = map(cut, jnp.split(qkv, 3, axis=-1))
  if table is None:
    return q, k, v, None
  if table.ndim == 2:
    return q, k, v, relative_position_bias(table, window)
  spread = jax.vmap(relative_position_bias, in_axes=(0, None))
  return q, k, v, spread(table, window)[:, None]


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Equation (6).

  Args:
    q: [*b, heads, n, d] queries; k and v likewise.
    k: keys.
    v: values.
    bias: [heads, n, n], anything that broadcasts to [*b, heads, n, n], or None
      for B = 0.

  Returns:
    [*b, heads, n, d] of v's dtype.
  """
  weights = attention_weights(q, k, bias, v.dtype)
  return jnp.einsum("...nm,...md->...nd", weights, v)


def attention_weights(
  q: jax.Array,
  k: jax.Array,
  bias: jax.Array | None,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """The softmax of (6): [*b, heads, n, n], axes (query, key).

  Computed in float32 (or wider, as q is), and rounded to dtype if given.
  """
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum(
    "...nd,...md->...nm",
    q * jnp.asarray(scale, q.dtype),
    k,
    preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
  )
  logits = logits if bias is None else _add_bias(logits, bias)
  return softmax(logits, dtype or logits.dtype)


@jax.custom_jvp
def _add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
  return logits + bias


@_add_bias.defjvp
def _add_bias_jvp(primals, tangents):
  logits, bias = primals
  d_logits, d_bias = tangents
  lead = logits.shape[: logits.ndim - bias.ndim]
  return logits + bias, d_logits + _repeat(d_bias, lead)


def _repeat(bias: jax.Array, lead: tuple[int, ...]) -> jax.Array:
  """[*shape] -> [*lead, *shape], whose gradient sums fast on CPU, too.

  XLA for CPU sums over leading axes 25 times slower than it contracts them
  (jax 0.10.2; 4 x 16 x 256 x 256), so there the sum is a product with ones.
  """

  def times_ones(bias):
    ones, no_axes = jnp.ones(lead, bias.dtype), ((), ())
    dimensions = no_axes, no_axes
    return jax.lax.dot_general(ones, bias, dimensions, precision="highest")

  return jax.lax.platform_dependent(
    bias,
    cpu=times_ones,
    default=lambda bias: jnp.broadcast_to(bias, (*lead, *bias.shape)),
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Over the last axis, rounded to dtype.

  It keeps its result for the backward pass, no more; `jax.nn.softmax` by itself
  keeps the exponentials, and both in float32.
  """
  return jax.nn.softmax(x, axis=-1).astype(dtype)


@softmax.defjvp
def _softmax_jvp(dtype, primals, tangents):
  y = softmax(*primals, dtype)

  def tangent(y, dx):
    y = y.astype(dx.dtype)
    return (y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))).astype(dtype)

  # Without the checkpoint, the wide copy of y is what would be kept.
  return y, jax.checkpoint(tangent, prevent_cse=False)(y, *tangents)


def relative_position_bias(table: jax.Array, side: int) -> jax.Array:
  """Spreads the table of relative offsets over all pairs of tokens.

  bias[h, n, m] = table[(row_n - row_m + side - 1) (2 side - 1)
                        + (col_n - col_m + side - 1), h]
  for tokens numbered along rows. Done axis by axis, without a gather or, in the
  gradient, a scatter: by pads and reshapes, on TPUs by products, to the same
  bits. There a reshape whose last dimension is `side` fills 128 lanes with it,
  and moves four times the bytes for a side of 32.

  Args:
    table: [(2 side - 1)^2, heads].
    side: rows (= columns) of the square of tokens.

  Returns:
    [heads, side^2, side^2], axes (head, query, key), of the table's dtype.
  """
  table = einops.rearrange(table, "(row col) h -> h row col", row=2 * side - 1)
  bias = jax.lax.platform_dependent(
    table,
    tpu=functools.partial(spread_by_products, side=side),
    default=functools.partial(spread_by_reshapes, side=side),
  )
  return einops.rearrange(bias, "h rn cn rm cm -> h (rn cn) (rm cm)")


def spread_by_products(table: jax.Array, side: int) -> jax.Array:
  """[h, row, col] offsets -> [h, rn, cn, rm, cm], by products with 0 and 1.

  They have h as a batch dimension, so that no remat policy takes them for
  products with weights and keeps them.
  """
  offsets, places = jnp.arange(2 * side - 1), jnp.arange(side)
  difference = places[:, None] - places + side - 1
  hot = (offsets[:, None, None] == difference).astype(table.dtype)
  hot = jnp.broadcast_to(hot, (len(table), *hot.shape))  # [h, offset, n, m]
  product = functools.partial(jnp.einsum, precision="highest")
  columns = product("hrc,hcnm->hrnm", table, hot)
  return product("hrnm,hrxy->hnxmy", hot, columns)


def spread_by_reshapes(table: jax.Array, side: int) -> jax.Array:
  """[h, row, col] offsets -> [h, rn, cn, rm, cm], by pads and reshapes."""
  bias = _toeplitz(_toeplitz(table, side), side)  # [h, rn, rm, cn, cm]
  return bias.swapaxes(2, 3)


def _toeplitz(values: jax.Array, side: int) -> jax.Array:
  """[h, 2 side - 1, *rest] -> [h, *rest, side, side], indexed by differences.

  out[h, ..., i, j] = values[h, i - j + side - 1, ...]. The reversed row of
  values, padded by one and repeated `side` times, read with a row length that
  is one shorter, moves by one position from row to row.
  """
  values = jnp.moveaxis(values[:, ::-1], 1, -1)  # [h, *rest, 2 side - 1]
  lead = values.shape[:-1]
  pad = [(0, 0)] * len(lead) + [(0, 1)]
  rows = jnp.pad(values, pad)[..., None, :]  # [h, *rest, 1, 2 side]
  rows = jnp.broadcast_to(rows, (*lead, side, 2 * side))
  flat = rows.reshape(*lead, 2 * side * side)[..., : side * (2 * side - 1)]
  return flat.reshape(*lead, side, 2 * side - 1)[..., side - 1 :]
