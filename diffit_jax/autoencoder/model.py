"""The network of the Stable Diffusion VAE (AutoencoderKL), inference only.

Kingma & Welling 2014 for the VAE, Rombach et al. 2022 for this network. Images
x are in [-1, 1]; GN is GroupNorm (eps 1e-6, affine); widths w_0..w_{L-1}; f =
2^(L-1) is the factor between the image's side and the latent's.

  Res(x)  = skip(x) + Conv3(SiLU(GN(Conv3(SiLU(GN(x))))))                   (1)
  Attn(x) = x + out(softmax(q k^T / sqrt(c)) v),  q, k, v from GN(x)        (2)
  Mid     = Res . Attn . Res                                                (3)
  Down(x) = Conv3, stride 2, of x padded by one zero right and below        (4)
  Up(x)   = Conv3 of x with every pixel doubled along both axes             (5)

  encoder: Conv3(3 -> w_0); L levels of n x Res, all but the last followed by
    (4); (3); Conv3(SiLU(GN)) to 2 x latent channels
  (mean, logvar) = split(Conv1(encoder(x))), logvar clamped to [-30, 20]    (6)
  decoder: Conv1; Conv3(latent -> w_{L-1}); (3); L levels, widest first, of
    (n + 1) x Res, all but the last followed by (5); Conv3(SiLU(GN)) to 3   (7)

skip in (1) is a 1x1 convolution where the width changes, else the identity.
The attention (2) has a single head over all pixels. The decoder's output is
not clamped. Latents here are unscaled: a diffusion model sees them multiplied
by the scaling factor of the weights.

Everything is NHWC and float32 with full-precision products: in half precision
such decoders are known to give black images. Parameters carry the names of
diffusers' files with "_0" for ".0".
"""

from collections.abc import Callable

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

LOGVAR_RANGE = (-30.0, 20.0)
PRECISION = jax.lax.Precision.HIGHEST


def conv(features: int, kernel_size: int, name: str | None = None, **kwargs):
  """A square convolution with bias; keeps the size unless told otherwise."""
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    **{"padding": kernel_size // 2, **kwargs},
    precision=PRECISION,
    name=name,
  )


def dense(features: int, name: str) -> nn.Dense:
  """A linear map with bias over the last axis."""
  return nn.Dense(features, precision=PRECISION, name=name)


def group_norm(num_groups: int, name: str) -> nn.GroupNorm:
  """GroupNorm over all pixels of a sample and the channels of a group."""
  return nn.GroupNorm(
    num_groups, epsilon=1e-6, use_fast_variance=False, name=name
  )


class ResBlock(nn.Module):
  """Equation (1).

  Attributes:
    features: width of the output.
    num_groups: number of groups of both GroupNorms.
  """

  features: int
  num_groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.silu(group_norm(self.num_groups, "norm1")(x))
    h = conv(self.features, 3, "conv1")(h)
    h = nn.silu(group_norm(self.num_groups, "norm2")(h))
    h = conv(self.features, 3, "conv2")(h)
    if x.shape[-1] != self.features:
      x = conv(self.features, 1, "conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Equation (2): [b, h, w, c] to the same shape."""

  num_groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    height, _, channels = x.shape[-3:]
    tokens = einops.rearrange(
      group_norm(self.num_groups, "group_norm")(x), "b h w c -> b (h w) c"
    )
    q, k, v = (
      dense(channels, name)(tokens) for name in ("to_q", "to_k", "to_v")
    )
    logits = jnp.einsum("bqc,bkc->bqk", q, k, precision=PRECISION)
    weights = nn.softmax(logits * channels**-0.5)  # [b, n, n]
    out = jnp.einsum("bqk,bkc->bqc", weights, v, precision=PRECISION)
    out = dense(channels, "to_out_0")(out)
    return x + einops.rearrange(out, "b (h w) c -> b h w c", h=height)


class MidBlock(nn.Module):
  """Equation (3) at one width."""

  num_groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = x.shape[-1]
    x = ResBlock(features, self.num_groups, name="resnets_0")(x)
    x = Attention(self.num_groups, name="attentions_0")(x)
    return ResBlock(features, self.num_groups, name="resnets_1")(x)


class Downsample(nn.Module):
  """Equation (4): [b, h, w, c] to [b, h/2, w/2, c], h and w even."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    right_and_below = ((0, 1), (0, 1))
    return conv(x.shape[-1], 3, "conv", strides=2, padding=right_and_below)(x)


class Upsample(nn.Module):
  """Equation (5): [b, h, w, c] to [b, 2h, 2w, c]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = einops.repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)
    return conv(x.shape[-1], 3, "conv")(x)


class Level(nn.Module):
  """Residual blocks at one width, then a change of resolution or none.

  Attributes:
    features: width of all blocks.
    num_blocks: how many.
    num_groups: number of groups of every GroupNorm.
    resample: makes the module that changes the resolution, or None.
    resample_name: its name.
  """

  features: int
  num_blocks: int
  num_groups: int
  resample: Callable[..., nn.Module] | None
  resample_name: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.num_blocks):
      x = ResBlock(self.features, self.num_groups, name=f"resnets_{i}")(x)
    return (
      x
      if self.resample is None
      else (self.resample(name=self.resample_name)(x))
    )


class Encoder(nn.Module):
  """Images [b, h, w, c_in] to features [b, h/f, w/f, features]."""

  features: int
  widths: tuple[int, ...]
  num_blocks: int
  num_groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = conv(self.widths[0], 3, "conv_in")(x)
    for i, width in enumerate(self.widths):
      is_last = i == len(self.widths) - 1
      x = Level(
        width,
        self.num_blocks,
        self.num_groups,
        None if is_last else Downsample,
        "downsamplers_0",
        name=f"down_blocks_{i}",
      )(x)
    x = MidBlock(self.num_groups, name="mid_block")(x)
    x = nn.silu(group_norm(self.num_groups, "conv_norm_out")(x))
    return conv(self.features, 3, "conv_out")(x)


class Decoder(nn.Module):
  """Latents [b, h, w, latent] to images [b, f h, f w, features]."""

  features: int
  widths: tuple[int, ...]
  num_blocks: int
  num_groups: int

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    x = conv(self.widths[-1], 3, "conv_in")(z)
    x = MidBlock(self.num_groups, name="mid_block")(x)
    for i, width in enumerate(reversed(self.widths)):
      is_last = i == len(self.widths) - 1
      x = Level(
        width,
        self.num_blocks + 1,
        self.num_groups,
        None if is_last else Upsample,
        "upsamplers_0",
        name=f"up_blocks_{i}",
      )(x)
    x = nn.silu(group_norm(self.num_groups, "conv_norm_out")(x))
    return conv(self.features, 3, "conv_out")(x)


class AutoencoderKL(nn.Module):
  """Equations (6) and (7); the defaults are sd-vae-ft-ema and -mse.

  Attributes:
    in_channels: number of channels of the images that go in.
    out_channels: number of channels of the images that come out.
    latent_channels: number of channels of mean and log-variance, each.
    block_out_channels: width of each level, finest first.
    layers_per_block: residual blocks of an encoder level; the decoder has one
      more.
    norm_num_groups: number of groups of every GroupNorm.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32

  @property
  def down_factor(self) -> int:
    """Side of an image over the side of its latent."""
    return 2 ** (len(self.block_out_channels) - 1)

  def setup(self):
    sizes = (
      self.block_out_channels,
      self.layers_per_block,
      self.norm_num_groups,
    )
    self.encoder = Encoder(2 * self.latent_channels, *sizes)
    self.decoder = Decoder(self.out_channels, *sizes)
    self.quant_conv = conv(2 * self.latent_channels, 1)
    self.post_quant_conv = conv(self.latent_channels, 1)

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Equation (6).

    Args:
      x: [b, h, w, in_channels] images in [-1, 1]; `down_factor` divides h, w.

    Returns:
      mean and logvar of the unscaled latent's Gaussian, float32 and each
      [b, h/f, w/f, latent_channels].
    """
    moments = self.quant_conv(self.encoder(x.astype(jnp.float32)))
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, z: jax.Array) -> jax.Array:
    """Equation (7).

    Args:
      z: [b, h, w, latent_channels] unscaled latents.

    Returns:
      [b, f h, f w, out_channels] float32.
    """
    return self.decoder(self.post_quant_conv(z.astype(jnp.float32)))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Decodes the mean; goes through every parameter, for `init`."""
    return self.decode(self.encode(x)[0])
