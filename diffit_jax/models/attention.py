"""Time-dependent multi-head self-attention, TMSA (DiffiT, section 3.2).

With spatial tokens x_s [n, c], one time token x_t [ct] for all of them, and
per head of width d:

  q_s = x_s W_qs + x_t W_qt      (3)
  k_s = x_s W_ks + x_t W_kt      (4)
  v_s = x_s W_vs + x_t W_vt      (5)
  TMSA = softmax(q_s k_s^T / sqrt(d) + B) v_s      (6)

B is a learned relative position bias [heads, n, n], the same for every sample.
As in the released code, both linear maps carry a bias vector, a linear map
follows the merged heads, and d is the head width (the paper calls it "a scaling
factor"). Windowed attention cuts the tokens into non-overlapping squares that
do not see each other; the time token is the same in each. Other places for
time than (3)-(5), which the paper compares with, are listed in `time_in`.
"""

from collections.abc import Callable
import functools

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.flat_product import flat_dot_general
from diffit_jax.models.time_in import TIME_IN

XAVIER = nn.initializers.xavier_uniform()
ATTENTIONS = ("xla", "cudnn")
INPUTS = "attention_inputs"  # (q, k, bias), left where a caller asks for them

# Says where an activation [b, ...] lies on the devices, or returns it as it is.
Constrain = Callable[[jax.Array], jax.Array]


def unconstrained(x: jax.Array) -> jax.Array:
  """The `Constrain` that leaves it to the compiler."""
  return x


def relative_position_bias(table: jax.Array, side: int) -> jax.Array:
  """Spreads the table of relative offsets over all pairs of tokens.

  bias[h, n, m] = table[(row_n - row_m + side - 1) (2 side - 1)
                        + (col_n - col_m + side - 1), h]
  for tokens numbered along rows. Done axis by axis with pads and reshapes, so
  that neither a gather nor, in the gradient, a scatter stands in the step.

  Args:
    table: [(2 side - 1)^2, heads].
    side: rows (= columns) of the square of tokens.

  Returns:
    [heads, side^2, side^2], axes (head, query, key), of the table's dtype.
  """
  table = einops.rearrange(table, "(row col) h -> h row col", row=2 * side - 1)
  bias = _toeplitz(_toeplitz(table, side), side)  # [h, rn, rm -> cn, cm]
  return einops.rearrange(bias, "h rn rm cn cm -> h (rn cn) (rm cm)")


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


def effective_window(side: int, window_size: int | None) -> int:
  """The side of the squares that attend to themselves on a side x side map.

  A window at or above the side is global attention there.

  Raises:
    UserError: the window is smaller than the side and does not divide it.
  """
  if window_size is None or window_size >= side:
    return side
  if window_size < 1 or side % window_size:
    divisors = [w for w in range(1, side + 1) if side % w == 0]
    raise UserError(
      f"window_size={window_size} does not divide the {side}x{side} feature"
      f" map: use one of {divisors}, or anything larger for global attention"
    )
  return window_size


class TMSA(nn.Module):
  """Time-dependent self-attention, equations (3)-(6), global or windowed.

  Attributes:
    num_heads: heads; must divide the width of x.
    window_size: side of the attention windows in tokens; None, or a value at or
      above the side of x, is global attention with a table of the side.
    dtype: of the matrix products; softmax and bias are float32.
    qkv_init: initialiser of the map of x to queries, keys and values.
    proj_init: initialiser of the output projection.
    attention: "xla", or "cudnn" for NVIDIA's fused kernel (see `attend`).
    time_in: where time enters, a key of `TIME_IN`.
    constrain: applied to the projections and the output.
  """

  num_heads: int
  window_size: int | None = None
  dtype: jnp.dtype = jnp.float32
  qkv_init: nn.initializers.Initializer = XAVIER
  proj_init: nn.initializers.Initializer = XAVIER
  attention: str = "xla"
  time_in: str = "tmsa"
  constrain: Constrain = unconstrained

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """[b, h, w, c] tokens on a grid, [b, ct] time tokens -> [b, h, w, c]."""
    height, width, channels = x.shape[1:]
    if channels % self.num_heads:
      raise UserError(f"num_heads={self.num_heads} must divide {channels=}")
    side = min(height, width)
    if height != width and (self.window_size or side + 1) > side:
      raise UserError(
        f"global attention needs a square feature map, not {height}x{width}"
      )
    window = effective_window(side, self.window_size)
    effective_window(max(height, width), window)
    entry = TIME_IN[self.time_in]
    bias = self._bias(time, window) if entry.has_bias else None

    dense = lambda name, features=3 * channels, init=XAVIER: nn.Dense(
      features,
      dtype=self.dtype,
      kernel_init=init,
      dot_general=flat_dot_general,
      name=name,
    )
    qkv = dense("qkv", init=self.qkv_init)(x)
    if entry.qkv:  # the seam: elsewhere time enters only in ablations
      qkv += dense("qkv_temb")(time)[:, None, None, :]
    qkv = self.constrain(qkv)

    windowed = lambda x: einops.rearrange(
      x,
      "b (i p) (j q) (h d) -> b (i j) h (p q) d",
      h=self.num_heads,
      p=window,
      q=window,
    )
    # Cut, then rearranged: so the gradients are joined, not padded and added.
    q, k, v = map(windowed, jnp.split(qkv, 3, axis=-1))
    self.sow("intermediates", INPUTS, (q, k, bias))  # where they are asked for
    out = attend(q, k, v, bias, self.attention)
    out = einops.rearrange(
      out,
      "b (i j) h (p q) d -> b (i p) (j q) (h d)",
      i=height // window,
      p=window,
    )
    out = dense("proj", channels, self.proj_init)(self.constrain(out))
    if entry.output:
      value = dense("time_value", channels, self.proj_init)
      out += value(time)[:, None, None, :]
    return out

  def _bias(self, time: jax.Array, window: int) -> jax.Array:
    """[heads, n, n], or [b, 1, heads, n, n] where it depends on time."""
    shape = ((2 * window - 1) ** 2, self.num_heads)
    init = nn.initializers.normal(0.02)
    name = "relative_position_bias_table"
    table = self.param(name, init, shape, jnp.float32)
    if not TIME_IN[self.time_in].bias_table:
      return relative_position_bias(table, window)
    offsets = nn.Dense(shape[0] * shape[1], kernel_init=XAVIER, name="rpb_temb")
    tables = table + offsets(time).reshape(-1, *shape)
    spread = jax.vmap(relative_position_bias, in_axes=(0, None))
    return spread(tables, window)[:, None]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  attention: str = "xla",
) -> jax.Array:
  """Equation (6): softmax(q k^T / sqrt(d) + B) v, softmax in float32.

  Args:
    q: [*b, heads, n, d] queries; k and v likewise.
    k: keys.
    v: values.
    bias: [heads, n, n], anything that broadcasts to [*b, heads, n, n], or None
      for B = 0.
    attention: "xla"; or "cudnn", which takes bfloat16 and float16 only and
      rounds the bias to it.

  Returns:
    [*b, heads, n, d] of v's dtype.
  """
  if attention == "cudnn":
    return _attend_cudnn(q, k, v, bias)
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


def _attend_cudnn(q, k, v, bias):
  """The same through cuDNN, whose gradient of the bias wants a batch of 1."""
  heads, n, d = q.shape[-3:]
  flat = lambda x: x.reshape(-1, heads, n, d).swapaxes(1, 2)
  out = jax.nn.dot_product_attention(
    flat(q),
    flat(k),
    flat(v),
    bias=bias[None].astype(q.dtype),
    scale=d**-0.5,
    implementation="cudnn",
  )
  return out.swapaxes(1, 2).reshape(q.shape)
