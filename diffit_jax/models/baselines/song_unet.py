"""DDPM++ and NCSN++, the networks of Table 5, with and without TMSA.

Song et al. 2021, "Score-Based Generative Modeling through SDEs" (arXiv
2011.13456), in the form that Karras et al. 2022 (EDM) train. A block is

  h = Conv3x3(SiLU(GN(x)))                      where it resizes, by this one
  h = h + W e                                   e: embedding of the noise
  h = Conv3x3(dropout(SiLU(GN(h))))
  x = (h + skip(x)) / sqrt(2)                                            (1)
  x = (x + Attention(GN(x))) / sqrt(2)          on the maps of some sides (2)

Every output of the encoder, resized maps too, waits for one block of the
decoder, last in first out. Two steps of a filter resize: [1, 1] (means down,
nearest up) or, in NCSN++, [1, 3, 3, 1], which also carries a pyramid of the
image down beside the encoder:

  aux = (x + Conv3x3-down(aux)) / sqrt(2),   x = aux                     (3)

With TMSA, the attention of (2), one head, becomes time-dependent (3)-(6) of
`attention`, with e as the time token; nothing else changes. CHOICE: the paper
says no more than that.
"""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.models.attention import TMSA, Attention
from diffit_jax.models.blocks import NEAR_ZERO, conv, drop_out, group_norm
from diffit_jax.models.compute import Compute
from diffit_jax.models.embeddings import NoiseEmbedding
from diffit_jax.models.kernels import AttentionShape
from diffit_jax.models.linear import XAVIER, linear
from diffit_jax.models.network import Network

_SKIP_SCALE = 0.5**0.5
_QKV_INIT = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")


def resample(
  x: jax.Array, taps: Sequence[int], up: bool, pad: int | None = None
) -> jax.Array:
  """Twice or half the side by the separable filter `taps`, of even length.

  Down: every second value of the correlation; up: zeros between the values,
  filtered with twice the gain per axis, so that a constant stays one.

  Args:
    x: [b, h, w, c].
    taps: weights of the filter along one axis; any scale.
    up: or down.
    pad: zeros on each side; None for what keeps exactly twice or half.
  """
  taps = np.asarray(taps, np.float32) / np.sum(taps)
  size, channels = len(taps), x.shape[-1]
  kernel = np.outer(taps, taps)[:, :, None, None].repeat(channels, -1)
  if pad is None:
    pad = size // 2 if up else size // 2 - 1
  return jax.lax.conv_general_dilated(
    x,
    jnp.asarray(4 * kernel if up else kernel, x.dtype),
    window_strides=(1, 1) if up else (2, 2),
    padding=((pad, pad),) * 2,
    lhs_dilation=(2, 2) if up else None,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=channels,
  )


class UNetBlock(nn.Module):
  """Equations (1) and (2).

  Attributes:
    features: width out.
    resize: "", "up" or "down".
    has_attention: whether (2) follows.
    taps: weights of the filter that resizes.
    tmsa: whether time enters the attention.
    dropout: rate before the second convolution.
    compute: dtype, kernel of the attention, and so on.
  """

  features: int
  resize: str = ""
  has_attention: bool = False
  taps: Sequence[int] = (1, 1)
  tmsa: bool = False
  dropout: float = 0.0
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, x, emb, sample_index=None):
    """[b, h, w, c], [b, ct] -> [b, h', w', features]."""
    dtype, constrain = self.compute.dtype, self.compute.constrain
    norm = lambda name, x: group_norm(x.shape[-1], dtype, name)(x)
    resized = lambda x: (
      resample(x, self.taps, self.resize == "up") if self.resize else x
    )
    h = resized(nn.silu(norm("norm0", x)))
    h = conv(self.features, 3, dtype, "conv0")(h)
    shift = linear(self.features, dtype, "affine")(emb)
    h = constrain(h) + shift[:, None, None, :]
    h = nn.silu(norm("norm1", h))
    if self.dropout and sample_index is not None:
      h = drop_out(h, self.dropout, self.make_rng("dropout"), sample_index)
    h = conv(self.features, 3, dtype, "conv1", init=NEAR_ZERO)(h)
    if self.resize or x.shape[-1] != self.features:
      x = conv(self.features, 1, dtype, "skip")(resized(x))
    x = constrain((h + x) * _SKIP_SCALE)  # (1)
    if not self.has_attention:
      return x
    attention = (TMSA if self.tmsa else Attention)(
      num_heads=1,
      qkv_init=_QKV_INIT,
      proj_init=NEAR_ZERO,
      compute=self.compute,
      name="attn",
    )
    return (x + attention(norm("norm2", x), emb)) * _SKIP_SCALE  # (2)


class SongUNet(Network):
  """The raw network F(x, c_noise): DDPM++, or NCSN++ with `pyramid`.

  Attributes as of `Network`, and

  Attributes:
    channels: number of channels of input and output images.
    base_channels: width that `channel_mult` multiplies.
    channel_mult: width of each level over base_channels.
    num_blocks: blocks per level; the decoder has one more.
    attention_sides: sides of the maps whose blocks have attention.
    pyramid: NCSN++: Fourier embedding of twice the width, the filter
      [1, 3, 3, 1], and (3).
    tmsa: whether time enters the attention.
    num_classes: 0 for an unconditional network.
    augment_dim: augmentation labels, 0 for none.
    dropout: rate in each block.
  """

  channels: int = 3
  base_channels: int = 128
  channel_mult: Sequence[int] = (2, 2, 2)
  num_blocks: int = 4
  attention_sides: Sequence[int] = (16,)
  pyramid: bool = False
  tmsa: bool = False
  num_classes: int = 0
  augment_dim: int = 9
  dropout: float = 0.0

  @property
  def taps(self) -> tuple[int, ...]:
    """The taps of the filter that resizes."""
    return (1, 3, 3, 1) if self.pyramid else (1, 1)

  @property
  def bias_option(self) -> str:
    return f"model.tmsa={self.tmsa}"

  def attention_shapes(self, side: int) -> list[AttentionShape]:
    """One head as wide as the map, at the sides that have it and the bottom."""
    width, last = self.base_channels, len(self.channel_mult) - 1
    bias = "shared" if self.tmsa else "none"
    return [
      AttentionShape((side // 2**level) ** 2, 1, width * factor, bias)
      for level, factor in enumerate(self.channel_mult)
      if level == last or side // 2**level in self.attention_sides
    ]

  @nn.compact
  def __call__(
    self, x, c_noise, labels=None, augment_labels=None, sample_index=None
  ):
    """As ImageDiffiT."""
    self._check(x)
    emb = NoiseEmbedding(
      self.base_channels * (2 if self.pyramid else 1),
      4 * self.base_channels,
      self.num_classes,
      self.augment_dim,
      "fourier" if self.pyramid else "positional",
      name="embedding",
    )(c_noise, labels, augment_labels)
    block = self.compute.transform(UNetBlock)

    def run(h, width, name, resize="", has_attention=None):
      if has_attention is None:
        has_attention = h.shape[1] in self.attention_sides
      return block(
        width,
        resize,
        has_attention,
        self.taps,
        self.tmsa,
        self.dropout,
        self.compute,
        name=name,
      )(h, emb, sample_index)

    x = x.astype(self.dtype)
    h = self._decode(self._encode(x, run), run)
    h = nn.silu(group_norm(h.shape[-1], self.dtype, "head_norm")(h))
    h = conv(self.channels, 3, self.dtype, "head", init=NEAR_ZERO)(h)
    return h.astype(jnp.promote_types(h.dtype, jnp.float32))

  def _encode(self, x, run) -> list[jax.Array]:
    """All outputs, the first convolution's first."""
    h, aux = conv(self.base_channels, 3, self.dtype, "tokenizer")(x), x
    skips = [h]
    for level, factor in enumerate(self.channel_mult):
      if level:
        name = f"encoder_{level}_down"
        h = run(h, h.shape[-1], name, "down", has_attention=False)
        if self.pyramid:
          aux = self._shrink(aux, h.shape[-1], f"encoder_{level}_aux")
          h = aux = (h + aux) * _SKIP_SCALE  # (3)
        skips.append(h)
      for i in range(self.num_blocks):
        width = self.base_channels * factor
        h = run(h, width, f"encoder_{level}_block_{i}")
        skips.append(h)
    return skips

  def _shrink(self, aux, features: int, name: str):
    """The convolution of (3), then the filter on it, then the bias.

    The convolution is padded by 2, so that the filter needs no zeros.
    """
    x = nn.Conv(
      features,
      (3, 3),
      padding=2,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=XAVIER,
      name=name,
    )(aux)
    init = nn.initializers.zeros
    bias = self.param(f"{name}_bias", init, (features,), jnp.float32)
    return resample(x, self.taps, up=False, pad=0) + bias.astype(x.dtype)

  def _decode(self, skips, run) -> jax.Array:
    h = skips[-1]
    last = len(self.channel_mult) - 1
    for level in range(last, -1, -1):
      width, name = h.shape[-1], f"decoder_{level}"
      if level == last:
        h = run(h, width, f"{name}_in0", has_attention=True)
        h = run(h, width, f"{name}_in1", has_attention=False)
      else:
        h = run(h, width, f"{name}_up", "up", has_attention=False)
      for i in range(self.num_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        has_attention = None if i == self.num_blocks else False
        width = self.base_channels * self.channel_mult[level]
        h = run(h, width, f"{name}_block_{i}", has_attention=has_attention)
    return h

  def _check(self, x) -> None:
    self.check_compute(x.shape[1])
    factor = 2 ** (len(self.channel_mult) - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
      raise UserError(
        f"images of {x.shape[1]}x{x.shape[2]} cannot be halved"
        f" {len(self.channel_mult) - 1} times for the levels of"
        " model.channel_mult"
      )
