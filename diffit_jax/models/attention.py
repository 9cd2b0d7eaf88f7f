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

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import Compute
from diffit_jax.models.kernels import plain
from diffit_jax.models.linear import XAVIER, linear
from diffit_jax.models.time_in import TIME_IN

INPUTS = "attention_inputs"  # (q, k, bias), left where a caller asks for them


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
    table = self._tables(window, time) if self.has_bias else None
    qkv = self.compute.constrain(self._qkv(x, time))
    arguments = qkv, table, self.num_heads, window
    if self.is_mutable_collection("intermediates"):  # they are asked for
      q, k, _, bias = plain.heads_of(*arguments)
      self.sow("intermediates", INPUTS, (q, k, bias))
    out = kernels.attend(*arguments, self.compute)
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

  def _tables(self, window: int, time: jax.Array | None) -> jax.Array:
    """[(2 window - 1)^2, heads], or [b, ...] where B depends on time."""
    del time
    return self._table(window)

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

  def _tables(self, window: int, time: jax.Array) -> jax.Array:
    table = self._table(window)
    if TIME_IN[self.time_in].bias != "each":
      return table
    offsets = nn.Dense(table.size, kernel_init=XAVIER, name="rpb_temb")
    return table + offsets(time).reshape(-1, *table.shape)

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
