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

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.compute import Compute
from diffit_jax.models.kernels import attend
from diffit_jax.models.linear import XAVIER, linear
from diffit_jax.models.time_in import TIME_IN

INPUTS = "attention_inputs"  # (q, k, bias), left where a caller asks for them


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


class Attention(nn.Module):
  """Self-attention (6), global or windowed, without time.

  Attributes:
    num_heads: heads; must divide the width of x.
    window_size: side of the attention windows in tokens; None, or a value at or
      above the side of x, is global attention with a table of the side.
    has_bias: whether there is a relative position bias B.
    qkv_init: initialiser of the map of x to queries, keys and values.
    proj_init: initialiser of the output projection.
    compute: dtype of the matrix products, kernel, and so on.
  """

  num_heads: int
  window_size: int | None = None
  has_bias: bool = False
  qkv_init: nn.initializers.Initializer = XAVIER
  proj_init: nn.initializers.Initializer = XAVIER
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    """[b, h, w, c] tokens on a grid -> [b, h, w, c].

    `time` [b, ct] is for `TMSA` alone, which is called in the same way.
    """
    window = self._window(x)
    bias = self._bias(window, time) if self.has_bias else None
    qkv = self.compute.constrain(self._qkv(x, time))
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
    out = attend(q, k, v, bias, self.compute.attention)
    out = einops.rearrange(
      out,
      "b (i j) h (p q) d -> b (i p) (j q) (h d)",
      i=x.shape[1] // window,
      p=window,
    )
    return self._project(self.compute.constrain(out), time)

  def _window(self, x: jax.Array) -> int:
    """Side of the windows, after refusing what cannot work."""
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
    return window

  def _table(self, window: int) -> jax.Array:
    """[(2 window - 1)^2, heads] of the relative position bias."""
    shape = ((2 * window - 1) ** 2, self.num_heads)
    init = nn.initializers.normal(0.02)
    name = "relative_position_bias_table"
    return self.param(name, init, shape, jnp.float32)

  def _bias(self, window: int, time: jax.Array | None) -> jax.Array:
    """B [heads, n, n]."""
    return relative_position_bias(self._table(window), window)

  def _qkv(self, x: jax.Array, time: jax.Array | None) -> jax.Array:
    """Queries, keys and values [b, h, w, 3c], side by side."""
    dtype = self.compute.dtype
    return linear(3 * x.shape[-1], dtype, "qkv", self.qkv_init)(x)

  def _project(self, x: jax.Array, time: jax.Array | None) -> jax.Array:
    """The merged heads [b, h, w, c] through the output's map."""
    dtype = self.compute.dtype
    return linear(x.shape[-1], dtype, "proj", self.proj_init)(x)


class TMSA(Attention):
  """Time-dependent self-attention (3)-(6); attributes as of Attention, and

  Attributes:
    time_in: where time enters the attention, a key of `TIME_IN`; see
      `attention_with` for rows that have no time there.
  """

  has_bias: bool = True
  time_in: str = "tmsa"

  def _bias(self, window: int, time: jax.Array) -> jax.Array:
    """B [heads, n, n], or [b, 1, heads, n, n] where it depends on time."""
    if TIME_IN[self.time_in].bias != "each":
      return super()._bias(window, time)
    table = self._table(window)
    offsets = nn.Dense(table.size, kernel_init=XAVIER, name="rpb_temb")
    tables = table + offsets(time).reshape(-1, *table.shape)
    spread = jax.vmap(relative_position_bias, in_axes=(0, None))
    return spread(tables, window)[:, None]

  def _qkv(self, x: jax.Array, time: jax.Array) -> jax.Array:
    qkv = super()._qkv(x, time)
    if TIME_IN[self.time_in].qkv:  # elsewhere time enters only in ablations
      shift = linear(qkv.shape[-1], self.compute.dtype, "qkv_temb")(time)
      qkv += shift[:, None, None, :]
    return qkv

  def _project(self, x: jax.Array, time: jax.Array) -> jax.Array:
    out = super()._project(x, time)
    if TIME_IN[self.time_in].output:
      dtype, init = self.compute.dtype, self.proj_init
      value = linear(x.shape[-1], dtype, "time_value", init)(time)
      out += value[:, None, None, :]
    return out


def attention_with(time_in: str, *args, **fields) -> Attention:
  """TMSA, or plain Attention where a row of `TIME_IN` has no time in it."""
  row = TIME_IN[time_in]
  if row.in_attention:
    return TMSA(*args, time_in=time_in, **fields)
  return Attention(*args, has_bias=row.bias != "none", **fields)
