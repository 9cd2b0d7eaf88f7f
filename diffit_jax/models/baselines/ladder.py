"""The rungs below DiffiT of the architecture ladder (Table 4, A to D).

  A  ViT-Base encoder, 12 layers              SETR-MLA decoder
  B  multi-resolution encoder                 SETR-MLA decoder
  C  multi-resolution encoder                 multi-resolution decoder
  D  DiffiT encoder                           multi-resolution decoder
  (E  DiffiT encoder and decoder: ImageDiffiT)

The lower rungs have plain transformer blocks, without relative position bias,
in which time is "adaptively scaled and simply added", once per stage:

  x = x + g * W x_t        g: a learned scale for each channel            (1)

SETR-MLA (Zheng et al. 2021, arXiv 2012.15840) brings the outputs of four stages
to one width, adds them from the deepest up, and joins what two convolutions
make of each.

CHOICE (the paper says no more than the names): patches of 4 in A, whose four
stages are three layers each, with learned positions; g starts at 1; a stage of
B to D is ImageDiffiT's level, its windows, widths and depths, with a linear map
where the width changes; SETR-MLA's widths are 256 and 128, and its last
convolution is the head that all rungs share.
"""

from typing import NamedTuple

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.blocks import NEAR_ZERO, DiffiTBlock, conv
from diffit_jax.models.image import ImageDiffiT
from diffit_jax.models.kernels import AttentionShape
from diffit_jax.models.linear import XAVIER, linear


class Rung(NamedTuple):
  """What each path of the network is made of.

  Attributes:
    encoder: "vit", "plain" or "diffit".
    decoder: "mla" or "plain".
    lacks: options of ImageDiffiT that change nothing in it.
  """

  encoder: str
  decoder: str
  lacks: tuple[str, ...]


RUNGS = {
  "A": Rung("vit", "mla", ("time_in", "skip", "decoder_in_conv", "resize")),
  "B": Rung("plain", "mla", ("time_in", "skip", "decoder_in_conv")),
  "C": Rung("plain", "plain", ("time_in",)),
  "D": Rung("diffit", "plain", ()),
}
_MLA_WIDTHS = (256, 128)


class TimeAdded(nn.Module):
  """Equation (1)."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """[b, h, w, c], [b, ct] -> [b, h, w, c]."""
    init = nn.initializers.ones
    gate = self.param("gate", init, x.shape[-1:], jnp.float32)
    dense = linear(x.shape[-1], self.dtype, "map")
    return x + (gate * dense(time)).astype(x.dtype)[:, None, None, :]


class PlainBlock(nn.Module):
  """A transformer block; at the start of a stage, width and time before it.

  Attributes:
    block: fields of the DiffiTBlock, whose time enters nowhere.
    features: its width.
    is_process_0: whether a stage begins.
  """

  block: dict
  features: int
  is_process_0: bool

  @nn.compact
  def __call__(self, x, time, sample_index=None):
    """[b, h, w, c], [b, ct] -> [b, h, w, features]."""
    dtype = self.block["compute"].dtype
    if x.shape[-1] != self.features:
      x = nn.Dense(
        self.features, dtype=dtype, kernel_init=XAVIER, name="width"
      )(x)
    if self.is_process_0:
      x = TimeAdded(dtype, name="time")(x, time)
    block = DiffiTBlock(**self.block, time_in="none", name="block")
    return block(x, time, sample_index)


class LadderRung(ImageDiffiT):
  """The raw network; attributes and call as of ImageDiffiT, and

  Attributes:
    rung: "A", "B", "C" or "D".
    vit_dim: width of A's encoder.
    vit_depth: its layers, a multiple of 4.
    vit_heads: its heads.
    patch_size: side of its patches.
  """

  rung: str = "C"
  vit_dim: int = 768
  vit_depth: int = 12
  vit_heads: int = 12
  patch_size: int = 4

  def attention_shapes(self, side: int) -> list[AttentionShape]:
    """That of each kind of block, for images of side x side."""
    rung = RUNGS[self.rung]
    if rung.encoder == "vit":
      tokens = (side // self.patch_size) ** 2
      width = self.vit_dim // self.vit_heads
      return [AttentionShape(tokens, self.vit_heads, width, "none")]
    levels = super().attention_shapes(side)
    plain = [level._replace(bias="none") for level in levels]
    encoder = levels if rung.encoder == "diffit" else plain
    return encoder + (plain[:-1] if rung.decoder == "plain" else [])

  def _block(self, width: int, name: str) -> nn.Module:
    path = name.partition("_")[0]
    if getattr(RUNGS[self.rung], path, "vit") == "diffit":
      return super()._block(width, name)
    is_vit = path == "vit"
    place = int(name.rpartition("_")[2])
    is_process_0 = place % (self.vit_depth // 4) == 0 if is_vit else place == 0
    fields = dict(
      num_heads=self.vit_heads if is_vit else width // self.head_dim,
      window_size=None if is_vit else self.window_size,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      last_init=NEAR_ZERO,
      compute=self.compute,
    )
    block = self.compute.transform(PlainBlock)
    return block(fields, width, is_process_0, name=name)

  def _encode(self, h, widths, depths, run_block):
    if RUNGS[self.rung].encoder != "vit":
      return super()._encode(h, widths, depths, run_block)
    return self._encode_vit(h, run_block)

  def _encode_vit(self, h, run_block) -> list[list[jax.Array]]:
    """Four stages of tokens, all of one size."""
    side = self.patch_size
    patches = einops.rearrange(
      h, "b (i p) (j q) c -> b i j (p q c)", p=side, q=side
    )
    h = nn.Dense(
      self.vit_dim, dtype=self.dtype, kernel_init=XAVIER, name="patch_embed"
    )(patches)
    h += self.param(
      "positions", nn.initializers.normal(0.02), h.shape[1:], jnp.float32
    ).astype(h.dtype)
    stages = []
    for i in range(self.vit_depth):
      h = run_block(h, self.vit_dim, f"vit_{i}")
      if (i + 1) % (self.vit_depth // 4) == 0:
        stages.append([h])
    return stages

  def _decode(self, skips, widths, depths, run_block):
    if RUNGS[self.rung].decoder != "mla":
      return super()._decode(skips, widths, depths, run_block)
    return self._decode_mla([outputs[-1] for outputs in skips])

  def _decode_mla(self, stages) -> jax.Array:
    """SETR-MLA, up to the size of the image."""
    inner, outer = _MLA_WIDTHS
    side = stages[0].shape[1]
    if RUNGS[self.rung].encoder == "vit":
      side *= self.patch_size
    below, found = 0.0, []
    for i in reversed(range(len(stages))):
      x = conv(inner, 1, self.dtype, f"mla_{i}_in")(stages[i])
      if i < len(stages) - 1:
        x += _enlarge(below, x.shape[1])
      below = x
      x = nn.relu(conv(inner, 3, self.dtype, f"mla_{i}_conv0")(x))
      x = nn.relu(conv(outer, 3, self.dtype, f"mla_{i}_conv1")(x))
      found.append(_enlarge(x, side))
    return self.constrain(jnp.concatenate(found[::-1], axis=-1))

  def _check(self, x):
    self._check_rung(x.shape[1])
    return super()._check(x)

  def _check_rung(self, side: int) -> None:
    if self.rung not in RUNGS:
      raise UserError(f"model.rung={self.rung!r}: use one of {tuple(RUNGS)}")
    for field in RUNGS[self.rung].lacks:
      value, default = getattr(self, field), getattr(LadderRung, field)
      if value != default:
        having = [name for name, r in RUNGS.items() if field not in r.lacks]
        raise UserError(
          f"model.{field}={value!r} changes nothing in model.rung"
          f"={self.rung!r}: only image_diffit and the rungs {having} have it;"
          f" leave it at {default!r}"
        )
    if self.rung != "A":
      return
    if side % self.patch_size:
      raise UserError(
        f"model.patch_size={self.patch_size} does not divide the image's side"
        f" {side}"
      )
    if self.vit_depth % 4 or self.vit_dim % self.vit_heads:
      raise UserError(
        f"model.vit_depth={self.vit_depth} must be a multiple of 4, and"
        f" model.vit_dim={self.vit_dim} of model.vit_heads={self.vit_heads}"
      )


def _enlarge(x: jax.Array, side: int) -> jax.Array:
  """Bilinearly to side x side."""
  if x.shape[1] == side:
    return x
  shape = (len(x), side, side, x.shape[-1])
  return jax.image.resize(x, shape, "bilinear")
