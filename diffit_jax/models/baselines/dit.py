"""DiT's modulation in place of TMSA (Figure 7b, Table 9).

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (arXiv
2212.09748), adaLN-Zero. The time token c enters no attention; in each block a
linear map of it, zero at the start, shifts, scales and gates:

  (b1, g1, a1, b2, g2, a2) = W SiLU(c)
  x = x + a1 Attention(LN(x) (1 + g1) + b1)      (1)
  x = x + a2 MLP(LN(x) (1 + g2) + b2)            (2)

and before the head LN(x) (1 + g) + b likewise, without SiLU. The attention has
no relative position bias. All else is LatentDiffiT.
"""

from typing import ClassVar

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.models.attention import TMSA, Constrain, unconstrained
from diffit_jax.models.blocks import MLP, XAVIER
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.models.layer_norm import layer_norm


def modulation(time: jax.Array, parts: int, features: int, dtype, name: str):
  """W SiLU(c) in parts of [b, 1, 1, features] each; W starts at zero."""
  dense = nn.Dense(
    parts * features,
    dtype=dtype,
    kernel_init=nn.initializers.zeros,
    name=name,
  )
  return einops.rearrange(
    dense(nn.silu(time)), "b (part c) -> part b 1 1 c", part=parts
  )


class DiTBlock(nn.Module):
  """Equations (1) and (2); attributes as of DiffiTBlock."""

  num_heads: int
  mlp_ratio: float = 4
  dtype: jnp.dtype = jnp.float32
  attention: str = "xla"
  constrain: Constrain = unconstrained

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """[b, h, w, c], [b, ct] -> [b, h, w, c]."""
    attention = TMSA(
      self.num_heads,
      dtype=self.dtype,
      attention=self.attention,
      time_in="none",
      constrain=self.constrain,
      name="attn",
    )
    mlp = MLP(
      self.mlp_ratio, 0.0, self.dtype, XAVIER, self.constrain, name="mlp"
    )
    b1, g1, a1, b2, g2, a2 = modulation(
      time, 6, x.shape[-1], self.dtype, "modulation"
    )
    norm = lambda x, shift, scale: (
      layer_norm(x, self.dtype) * (1 + scale) + shift
    )
    x = self.constrain(x)
    x = x + a1 * attention(norm(x, b1, g1), time)  # (1)
    x = x + a2 * mlp(norm(x, b2, g2), None)  # (2)
    return self.constrain(x)


class DiT(LatentDiffiT):
  """The raw network; attributes and call as of LatentDiffiT."""

  block_type: ClassVar[type[nn.Module]] = DiTBlock
  attentions: ClassVar[tuple[str, ...]] = ("xla",)  # it has no bias

  def _normalise(self, h: jax.Array, time: jax.Array) -> jax.Array:
    shift, scale = modulation(
      time, 2, h.shape[-1], jnp.float32, "head_modulation"
    )
    return layer_norm(h, jnp.float32) * (1 + scale) + shift
