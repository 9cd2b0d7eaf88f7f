"""A fixed linear code in place of a VAE: squares of pixels become channels.

  latent[i, j, (p, q, ch)] = image[side i + p, side j + q, ch]

Exactly invertible, without parameters, and with the interface of `Autoencoder`,
so that the whole latent path can be run, and scored, without an SD VAE.
"""

import dataclasses

import einops
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PatchCode:
  """Space to depth and back.

  Attributes:
    side: pixels per side of a square.
    scaling_factor: by which the diffusion multiplies latents.
    params: parameters of `encode_fn` and `decode_fn`; there are none.
  """

  side: int
  scaling_factor: float = 1.0
  params: tuple = ()

  @property
  def down_factor(self) -> int:
    return self.side

  @property
  def hash(self) -> str:
    return f"patch{self.side}"

  source = "a fixed linear code"

  def encode_fn(self, params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[b, h, w, ch] -> mean [b, h/side, w/side, side^2 ch], its log-variance.

    The code has no variance; -30 is the least that the SD VAE's may have.
    """
    del params
    if images.shape[1] % self.side or images.shape[2] % self.side:
      raise UserError(
        f"images of {images.shape[1]}x{images.shape[2]} cannot be cut into"
        f" squares of side {self.side}"
      )
    mean = einops.rearrange(
      images, "b (i p) (j q) c -> b i j (p q c)", p=self.side, q=self.side
    )
    return mean, jnp.full_like(mean, -30.0)

  def decode_fn(self, params, latents: jax.Array) -> jax.Array:
    """The inverse of `encode_fn`'s mean."""
    del params
    return einops.rearrange(
      latents, "b i j (p q c) -> b (i p) (j q) c", p=self.side, q=self.side
    )

  def encode(self, images) -> tuple[jax.Array, jax.Array]:
    return self.encode_fn(self.params, jnp.asarray(images))

  def decode(self, latents) -> jax.Array:
    return self.decode_fn(self.params, jnp.asarray(latents))
