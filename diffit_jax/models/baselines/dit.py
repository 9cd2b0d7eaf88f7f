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

from diffit_jax.models.attention import Attention
from diffit_jax.models.blocks import MLP
from diffit_jax.models.compute import Compute
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.models.layer_norm import layer_norm
from diffit_jax.models.linear import XAVIER, linear


def modulation(time: jax.Array, parts: int, features: int, dtype, name: str):
  """W SiLU(c) in parts of [b, 1, 1, features] each; W starts at zero."""
  dense = linear(parts * features, dtype, name, nn.initializers.zeros)
  return einops.rearrange(
    dense(nn.silu(time)), "b (part c) -> part b 1 1 c", part=parts
  )


class DiTBlock(nn.Module):
  """Equations (1) and (2); attributes as of DiffiTBlock."""

  num_heads: int
  mlp_ratio: float = 4
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """[b, h, w, c], [b, ct] -> [b, h, w, c]."""
    dtype, constrain = self.compute.dtype, self.compute.constrain
    attention = Attention(self.num_heads, compute=self.compute, name="attn")
    mlp = MLP(self.mlp_ratio, 0.0, XAVIER, self.compute, name="mlp")
    b1, g1, a1, b2, g2, a2 = modulation(
      time, 6, x.shape[-1], dtype, "modulation"
    )
    norm = lambda x, shift, scale: layer_norm(x, dtype) * (1 + scale) + shift
    x = constrain(x)
    x = x + a1 * attention(norm(x, b1, g1))  # (1)
    x = x + a2 * mlp(norm(x, b2, g2), None)  # (2)
    return constrain(x)


class DiT(LatentDiffiT):
  """The raw network; attributes and call as of LatentDiffiT."""

  block_type: ClassVar[type[nn.Module]] = DiTBlock
  bias: ClassVar[str] = "none"

  def _normalise(self, h: jax.Array, time: jax.Array) -> jax.Array:
    shift, scale = modulation(
      time, 2, h.shape[-1], jnp.float32, "head_modulation"
    )
    return layer_norm(h, jnp.float32) * (1 + scale) + shift
