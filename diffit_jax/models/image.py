"""Image-space DiffiT: a U-shaped stack of DiffiT ResBlocks (Figure 4).

  tokenizer Conv3x3
  encoder   level k = 0, 1, ..: ResBlocks, then a stride-2 Conv3x3
  the last level is the bottleneck, shared by both paths
  decoder   level k = .., 1, 0: nearest x2 + Conv3x3, the encoder's output
            beside it, ResBlocks
  head      GroupNorm -> SiLU -> Conv3x3

A level's width changes inside its first ResBlock; resizing keeps the width.
CHOICE (the paper is silent or contradicts itself; `docs/decisions.md`): heads
64 wide; the encoder level's output before downsampling is what its decoder
level concatenates; SiLU in the head as in EDM; no convolution at the
decoder's start.
"""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.blocks import NEAR_ZERO, ResBlock, conv, group_norm
from diffit_jax.models.embeddings import EMBEDDINGS, NoiseEmbedding
from diffit_jax.models.kernels import AttentionShape
from diffit_jax.models.network import Network
from diffit_jax.models.time_in import TIME_IN

OPTIONS = {
  "skip": ("concat", "add", "per_block"),
  "head_act": ("silu", "none"),
  "resize": ("conv", "bilinear"),
  "embedding": EMBEDDINGS,
  "time_in": tuple(TIME_IN),
}


class ImageDiffiT(Network):
  """The raw network F(x, c_noise) of the image-space model.

  Attributes as of `Network`, and

  Attributes:
    channels: number of channels of input and output images.
    base_channels: width that `channel_mult` multiplies, of the tokenizer, and
      of the sinusoidal noise embedding.
    channel_mult: width of each level over base_channels; its length is the
      number of levels, each of half the side of the one before.
    num_blocks: ResBlocks per level, one number or one per level.
    window_size: side of the attention windows; at or above a level's side, or
      None, attention is global there.
    head_dim: width of one attention head.
    time_dim: width of the time token.
    mlp_ratio: hidden width of the MLPs over a level's width.
    num_classes: 0 for an unconditional model; label num_classes is "no label".
    augment_dim: number of augmentation labels, 0 for none.
    dropout: rate inside the MLPs.
    skip: "concat" one encoder output per level, "add" it (through a 1x1
      convolution where widths differ), or "per_block" as in EDM: every encoder
      output of the level, one to each block of a decoder level that has one
      block more.
    head_act: "silu", or "none" as Figure 4 draws it.
    resize: "conv", or "bilinear" without parameters (appendix I.1).
    decoder_in_conv: a Conv3x3 at the start of the decoder, as the text has it
      and the figure has not.
    time_in: where time enters the blocks: "tmsa", or what the paper compares it
      with, see `time_in`.
    embedding: embedding of the noise level, "positional" or "fourier" (Table
      8).
  """

  channels: int = 3
  base_channels: int = 128
  channel_mult: Sequence[int] = (1, 2, 2, 2)
  num_blocks: int | Sequence[int] = 4
  window_size: int | None = 8
  head_dim: int = 64
  time_dim: int = 512
  mlp_ratio: int = 4
  num_classes: int = 0
  augment_dim: int = 9
  dropout: float = 0.0
  skip: str = "concat"
  head_act: str = "silu"
  resize: str = "conv"
  decoder_in_conv: bool = False
  time_in: str = "tmsa"
  embedding: str = "positional"

  @property
  def bias_option(self) -> str:
    return f"model.time_in={self.time_in!r}"

  def attention_shapes(self, side: int) -> list[AttentionShape]:
    """That of each level, for images of side x side."""
    shapes, bias = [], TIME_IN[self.time_in].bias
    for level, factor in enumerate(self.channel_mult):
      window = min(self.window_size or side, side // 2**level)
      heads = self.base_channels * factor // self.head_dim
      shapes.append(AttentionShape(window**2, heads, self.head_dim, bias))
    return shapes

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    c_noise: jax.Array,
    labels: jax.Array | None = None,
    augment_labels: jax.Array | None = None,
    sample_index: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the network.

    Args:
      x: [b, h, w, channels] noisy images, scaled by c_in.
      c_noise: [b] noise labels.
      labels: [b] int classes, None for "no label".
      augment_labels: [b, augment_dim], None for images as they are.
      sample_index: [b] global sample indices; given, dropout is on and needs
        a "dropout" rng.

    Returns:
      [b, h, w, channels] of at least float32.

    Raises:
      UserError: the sizes do not fit each other.
    """
    widths, depths = self._check(x)
    time = NoiseEmbedding(
      self.base_channels,
      self.time_dim,
      self.num_classes,
      self.augment_dim,
      self.embedding,
      name="embedding",
    )(c_noise, labels, augment_labels)

    def run_block(h, width, name):
      return self._block(width, name)(h, time, sample_index)

    h = conv(self.base_channels, 3, self.dtype, "tokenizer")(
      x.astype(self.dtype)
    )
    skips = self._encode(self.constrain(h), widths, depths, run_block)
    h = self._decode(skips, widths, depths, run_block)
    h = group_norm(h.shape[-1], self.dtype, "head_norm")(h)
    h = nn.silu(h) if self.head_act == "silu" else h
    h = conv(self.channels, 3, self.dtype, "head", init=NEAR_ZERO)(h)
    return h.astype(jnp.promote_types(h.dtype, jnp.float32))

  def _block(self, width: int, name: str) -> nn.Module:
    """The block (h, time, sample_index) -> h of that name."""
    return self.compute.transform(ResBlock)(
      width,
      self.head_dim,
      self.window_size,
      self.mlp_ratio,
      self.dropout,
      self.time_in,
      self.compute,
      name=name,
    )

  def _encode(self, h, widths, depths, run_block) -> list[list[jax.Array]]:
    """All outputs of each level, its input first."""
    skips = []
    for level, (width, depth) in enumerate(zip(widths, depths)):
      if level:
        h = self.constrain(self._down(h, f"encoder_{level}_down"))
      outputs = [h]
      for i in range(depth):
        h = run_block(h, width, f"encoder_{level}_block_{i}")
        outputs.append(h)
      skips.append(outputs)
    return skips

  def _decode(self, skips, widths, depths, run_block) -> jax.Array:
    """From the last level's output up to the first level's size."""
    h = skips[-1][-1]
    if self.decoder_in_conv:
      h = conv(widths[-1], 3, self.dtype, "decoder_in")(h)
    for level in reversed(range(len(widths) - 1)):
      h = self.constrain(self._up(h, f"decoder_{level}_up"))
      waiting = skips[level] if self.skip == "per_block" else skips[level][-1:]
      depth = depths[level] + (self.skip == "per_block")
      for i in range(depth):
        if waiting:
          h = self._merge(h, waiting.pop(), f"decoder_{level}_merge")
        h = run_block(h, widths[level], f"decoder_{level}_block_{i}")
    return h

  def _check(self, x: jax.Array) -> tuple[list[int], list[int]]:
    """Widths and depths of the levels, after refusing what cannot work."""
    for field, allowed in OPTIONS.items():
      if getattr(self, field) not in allowed:
        raise UserError(
          f"model.{field}={getattr(self, field)!r}: use one of {allowed}"
        )
    levels = len(self.channel_mult)
    widths = [self.base_channels * m for m in self.channel_mult]
    depths = self.num_blocks
    depths = [depths] * levels if isinstance(depths, int) else list(depths)
    if len(depths) != levels:
      raise UserError(
        f"model.num_blocks={depths} has {len(depths)} entries for"
        f" {levels} levels: give one number or {levels}"
      )
    if self.head_dim < 1 or min(depths) < 1:
      raise UserError(
        f"model.head_dim={self.head_dim} and model.num_blocks={depths} must be"
        " at least 1"
      )
    bad = [width for width in widths if width % self.head_dim]
    if bad:
      raise UserError(
        f"model.head_dim={self.head_dim} does not divide the level width"
        f" {bad[0]}"
      )
    if x.shape[-1] != self.channels:
      raise UserError(
        f"images have {x.shape[-1]} channels, model.channels={self.channels}"
      )
    factor = 2 ** (levels - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
      raise UserError(
        f"images of {x.shape[1]}x{x.shape[2]} cannot be halved"
        f" {levels - 1} times for the {levels} levels of model.channel_mult"
      )
    self.check_compute(x.shape[1])
    return widths, depths

  def _down(self, x: jax.Array, name: str) -> jax.Array:
    if self.resize == "conv":
      return conv(x.shape[-1], 3, self.dtype, name, stride=2)(x)
    return nn.avg_pool(x, (2, 2), (2, 2))  # bilinear at half the side

  def _up(self, x: jax.Array, name: str) -> jax.Array:
    b, h, w, c = x.shape
    if self.resize == "bilinear":
      return jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear")
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return conv(c, 3, self.dtype, name)(x.reshape(b, 2 * h, 2 * w, c))

  def _merge(self, x: jax.Array, skip: jax.Array, name: str) -> jax.Array:
    if self.skip != "add":
      return jnp.concatenate([x, skip], axis=-1)
    if x.shape[-1] != skip.shape[-1]:
      skip = conv(x.shape[-1], 1, self.dtype, name)(skip)
    return x + skip
