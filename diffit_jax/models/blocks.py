"""The DiffiT transformer block and the DiffiT ResBlock.

  x^ = TMSA(LN(x), x_t) + x       (7)
  x  = MLP(LN(x^)) + x^           (8)

  x^ = Conv3x3(Swish(GN(x)))               (9)
  x  = DiffiT-Block(x^, x_t) + x          (10)

(10) is a second residual level around the block's own two. Where a ResBlock
changes the width, x in (10) goes through a 1x1 convolution.
CHOICE: LayerNorm without affine parameters (the released latent model), MLP
ratio 4 with tanh-GELU, dropout between the two linear maps of the MLP,
GroupNorm with min(32, c/4) groups and eps 1e-6 (EDM); the paper gives
none of these.
"""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.models.attention import attention_with
from diffit_jax.models.compute import Compute
from diffit_jax.models.layer_norm import layer_norm
from diffit_jax.models.linear import XAVIER, linear
from diffit_jax.models.time_in import TIME_IN

# CHOICE: the last map of each residual branch starts at 1e-5 times Xavier, as
# EDM does for its last convolutions, so that a fresh network is near identity.
NEAR_ZERO = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def drop_out(
  x: jax.Array, rate: float, key: jax.Array, sample_index: jax.Array
) -> jax.Array:
  """Dropout whose mask depends on (key, sample index), not on the row.

  Args:
    x: [b, ...].
    rate: share of elements that become zero; the others grow by 1/(1 - rate).
    key: one key for this layer and step.
    sample_index: [b] global index of each sample.

  Returns:
    Like x.
  """

  def mask(index):
    return jax.random.bernoulli(
      jax.random.fold_in(key, index), jnp.float32(1 - rate), x.shape[1:]
    )

  keep = jax.vmap(mask)(sample_index)
  return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def group_norm(channels: int, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
  """GroupNorm with EDM's group count, statistics in float32."""
  return nn.GroupNorm(
    num_groups=max(min(32, channels // 4), 1),
    epsilon=1e-6,
    use_fast_variance=False,
    dtype=dtype,
    name=name,
  )


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
  """x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3): tanh-GELU.

  It keeps one array for the backward pass, its slope, where `jax.nn.gelu` by
  itself keeps five.
  """
  return jax.nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  rate, cubic = (2 / math.pi) ** 0.5, 0.044715
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  tanh = jnp.tanh(rate * (wide + cubic * wide**3))
  du = rate * (1 + 3 * cubic * wide**2)
  slope = (1 + tanh + wide * (1 - tanh**2) * du) / 2
  return gelu(x), slope.astype(x.dtype) * dx


class MLP(nn.Module):
  """Linear -> GELU (tanh) -> dropout -> Linear, width c -> ratio c -> c."""

  ratio: float
  dropout: float
  last_init: nn.initializers.Initializer
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array, sample_index: jax.Array | None) -> jax.Array:
    channels, dtype = x.shape[-1], self.compute.dtype
    x = linear(round(self.ratio * channels), dtype, "fc1")(x)
    x = gelu(self.compute.constrain(x))
    if self.dropout and sample_index is not None:
      x = drop_out(x, self.dropout, self.make_rng("dropout"), sample_index)
    return linear(channels, dtype, "fc2", self.last_init)(x)


class DiffiTBlock(nn.Module):
  """Equations (7) and (8).

  Attributes:
    num_heads: heads of the attention.
    window_size: side of its windows, None for global attention.
    mlp_ratio: hidden width of the MLP over the block's width.
    dropout: rate between the MLP's two linear maps.
    last_init: initialiser of the last map of each residual branch.
    time_in: where time enters, a key of `TIME_IN`.
    compute: dtype, kernel of the attention, and so on.
  """

  num_heads: int
  window_size: int | None = None
  mlp_ratio: float = 4
  dropout: float = 0.0
  last_init: nn.initializers.Initializer = XAVIER
  time_in: str = "tmsa"
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    sample_index: jax.Array | None = None,
  ) -> jax.Array:
    """[b, h, w, c], [b, ct] -> [b, h, w, c].

    `sample_index` [b] turns dropout on (with a "dropout" rng); None is off.
    """
    dtype, constrain = self.compute.dtype, self.compute.constrain
    attention = attention_with(
      self.time_in,
      self.num_heads,
      self.window_size,
      proj_init=self.last_init,
      compute=self.compute,
      name="attn",
    )
    mlp = MLP(
      self.mlp_ratio, self.dropout, self.last_init, self.compute, name="mlp"
    )
    x = constrain(x)
    x = x + attention(layer_norm(x, dtype), time)  # (7)
    h = layer_norm(x, dtype)
    if TIME_IN[self.time_in].mlp:
      h += linear(x.shape[-1], dtype, "mlp_temb")(time)[:, None, None, :]
    x = x + mlp(h, sample_index)  # (8)
    return constrain(x)


class ResBlock(nn.Module):
  """Equations (9) and (10): a convolution in front of a DiffiT block.

  Attributes:
    features: output width.
    head_dim: width of one attention head; must divide `features`.
    window_size: side of the attention windows, None for global.
    mlp_ratio: hidden width of the MLP over `features`.
    dropout: rate in the MLP.
    time_in: where time enters, a key of `TIME_IN`.
    compute: dtype, kernel of the attention, and so on.
  """

  features: int
  head_dim: int
  window_size: int | None = None
  mlp_ratio: int = 4
  dropout: float = 0.0
  time_in: str = "tmsa"
  compute: Compute = Compute()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    sample_index: jax.Array | None = None,
  ) -> jax.Array:
    """[b, h, w, c], [b, ct] -> [b, h, w, features]."""
    dtype, constrain = self.compute.dtype, self.compute.constrain
    block = DiffiTBlock(
      num_heads=self.features // self.head_dim,
      window_size=self.window_size,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      last_init=NEAR_ZERO,
      time_in=self.time_in,
      compute=self.compute,
      name="block",
    )
    h = nn.silu(group_norm(x.shape[-1], dtype, "norm")(x))
    h = constrain(conv(self.features, 3, dtype, "conv")(h))  # (9)
    if x.shape[-1] != self.features:
      x = constrain(conv(self.features, 1, dtype, "skip")(x))
    return block(h, time, sample_index) + x  # (10)


def conv(
  features: int,
  side: int,
  dtype: jnp.dtype,
  name: str,
  stride: int = 1,
  init: nn.initializers.Initializer = XAVIER,
) -> nn.Conv:
  """side x side convolution with side//2 zeros of padding on every edge."""
  return nn.Conv(
    features,
    (side, side),
    strides=stride,
    padding=side // 2,
    dtype=dtype,
    kernel_init=init,
    name=name,
  )
