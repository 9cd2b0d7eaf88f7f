"""Latent-space DiffiT: a flat stack of DiffiT blocks on SD-VAE latents.

  patches   p x p squares of the latent through one linear map, + positions
  x_t       time token, from timestep and label (`embeddings`)
  blocks    x = TMSA(LN(x), x_t) + x; x = MLP(LN(x)) + x      (7), (8)
  head      Linear(SiLU(LN(x))), each token back to p x p values

for the grid of n = g x g tokens of width D. The position of the token in row i
and column j is fixed, not trained, and holds the column first:

  [sin(j w), cos(j w), sin(i w), cos(i w)],  w_k = 10000^(-k / (D/4))   (11)

Attention is global, with a bias table of side g in each block; time enters
through TMSA alone (no adaLN, no gates). The released code decides where the
paper is silent: LayerNorm without affine, SiLU in the head, biases everywhere.
CHOICE: depth 28, which is the published 561M parameters; the paper's text has
30. Patches, positions, time token and head stay float32 whatever `dtype` is:
they are 0.1% of the work, and the head's output is a noise prediction.
"""

from collections.abc import Mapping
from typing import ClassVar

import einops
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.models.blocks import DiffiTBlock
from diffit_jax.models.embeddings import (
  LabelEmbedding,
  TimestepEmbedding,
  sincos_positions,
)
from diffit_jax.models.kernels import AttentionShape
from diffit_jax.models.layer_norm import layer_norm
from diffit_jax.models.linear import linear
from diffit_jax.models.network import Network

STACKED = "blocks"
BIAS_TABLE = "relative_position_bias_table"


class LatentDiffiT(Network):
  """The raw network of the latent model: noise and, if learned, variance.

  Attributes as of `Network`, and

  Attributes:
    input_size: side of the latent (image side / 8 with the SD VAE).
    patch_size: side of the squares that become tokens.
    channels: number of channels of the latent.
    hidden_dim: width D of the tokens; a multiple of 4 and of num_heads.
    depth: number of blocks; the paper's text has 30.
    num_heads: heads of each TMSA.
    mlp_ratio: hidden width of the MLPs over hidden_dim.
    num_classes: labels 0..num_classes-1; label num_classes is "no label".
    null_label: whether the label table has that last row, as it must for
      training with label dropout and for guidance.
    learn_sigma: whether the output also holds a variance for each channel.
    frequency_dim: width of the sinusoidal timestep embedding.
    scan_blocks: one traced block in a loop, with parameters stacked on axis 0
      under "blocks"; otherwise "blocks_0", "blocks_1", ...
  """

  input_size: int = 32
  patch_size: int = 2
  channels: int = 4
  hidden_dim: int = 1152
  depth: int = 28
  num_heads: int = 16
  mlp_ratio: float = 4
  num_classes: int = 1000
  null_label: bool = True
  learn_sigma: bool = True
  frequency_dim: int = 256
  scan_blocks: bool = True
  block_type: ClassVar[type[nn.Module]] = DiffiTBlock
  bias: ClassVar[str] = "shared"  # of the blocks' attention

  @property
  def grid(self) -> int:
    """Tokens along one side."""
    return self.input_size // self.patch_size

  @property
  def out_channels(self) -> int:
    return self.channels * (2 if self.learn_sigma else 1)

  def attention_shapes(self, side: int) -> list[AttentionShape]:
    """The one that all blocks have, for latents of side x side."""
    tokens = (side // self.patch_size) ** 2
    width = self.hidden_dim // self.num_heads
    return [AttentionShape(tokens, self.num_heads, width, self.bias)]

  @nn.compact
  def __call__(
    self, x: jax.Array, t: jax.Array, labels: jax.Array | None = None
  ) -> jax.Array:
    """Runs the network.

    Args:
      x: [b, input_size, input_size, channels] noisy latents.
      t: [b] original timesteps 0..999, whole or fractional.
      labels: [b] ints in 0..num_classes, None for "no label". Others give NaN.

    Returns:
      [b, input_size, input_size, out_channels] float32: the noise, then, with
      learn_sigma, the variance's position between its bounds.

    Raises:
      UserError: the sizes do not fit each other.
    """
    self._check(x, labels)
    if labels is None:
      labels = jnp.full(t.shape, self.num_classes)
    time = TimestepEmbedding(
      self.hidden_dim, self.frequency_dim, name="time_embed"
    )(t)
    time += LabelEmbedding(
      self.num_classes, self.hidden_dim, self.null_label, name="label_embed"
    )(labels)

    patches = einops.rearrange(
      x.astype(jnp.float32),
      "b (i pr) (j pc) c -> b i j (c pr pc)",
      pr=self.patch_size,
      pc=self.patch_size,
    )
    h = linear(self.hidden_dim, jnp.float32, "patch_embed")(patches)
    positions = sincos_positions(self.hidden_dim, self.grid)
    h += positions.reshape(self.grid, self.grid, -1)  # (11)
    h = self.constrain(h)

    h = self._run_blocks(h.astype(self.dtype), time)

    width, init = self.patch_size**2 * self.out_channels, nn.initializers.zeros
    h = linear(width, jnp.float32, "head", init)(self._normalise(h, time))
    return einops.rearrange(
      h,
      "b i j (pr pc c) -> b (i pr) (j pc) c",
      pr=self.patch_size,
      pc=self.patch_size,
    )

  def _normalise(self, h: jax.Array, time: jax.Array) -> jax.Array:
    """What the head reads of the last block's output."""
    del time
    return nn.silu(layer_norm(h, jnp.float32))

  def _run_blocks(self, h: jax.Array, time: jax.Array) -> jax.Array:
    block = self.compute.transform(
      self.block_type, prevent_cse=not self.scan_blocks
    )
    fields = dict(
      num_heads=self.num_heads, mlp_ratio=self.mlp_ratio, compute=self.compute
    )
    if not self.scan_blocks:
      for i in range(self.depth):
        h = block(**fields, name=f"{STACKED}_{i}")(h, time)
      return h
    scan = nn.scan(
      lambda block, h, time: (block(h, time), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    return scan(block(**fields, name=STACKED), h, time)[0]

  def _check(self, x: jax.Array, labels: jax.Array | None) -> None:
    if self.hidden_dim % 4 or self.hidden_dim % self.num_heads:
      raise UserError(
        f"model.hidden_dim={self.hidden_dim} must be a multiple of 4 and of"
        f" model.num_heads={self.num_heads}"
      )
    if self.input_size % self.patch_size:
      raise UserError(
        f"model.patch_size={self.patch_size} does not divide"
        f" model.input_size={self.input_size}"
      )
    expected = (self.input_size, self.input_size, self.channels)
    if x.shape[1:] != expected:
      raise UserError(
        f"latents are {'x'.join(map(str, x.shape[1:]))}, the model takes"
        f" {'x'.join(map(str, expected))} (model.input_size twice,"
        " model.channels)"
      )
    if labels is None and not self.null_label:
      raise UserError("labels are needed: this model has no null label")
    self.check_compute(self.input_size)


def stack_blocks(params: Mapping) -> dict:
  """Parameters of the unrolled model -> those of the scanned one."""
  names = [name for name in params if name.startswith(f"{STACKED}_")]
  if not names:
    raise UserError(f"no blocks to stack among {sorted(params)}")
  blocks = [params[f"{STACKED}_{i}"] for i in range(len(names))]
  stack = np.stack if _is_numpy(blocks) else jnp.stack
  stacked = jax.tree.map(lambda *leaves: stack(leaves), *blocks)
  rest = {name: params[name] for name in params if name not in names}
  return {**rest, STACKED: stacked}


def unstack_blocks(params: Mapping) -> dict:
  """The inverse of `stack_blocks`."""
  if STACKED not in params:
    raise UserError(f"no stacked blocks among {sorted(params)}")
  leaves, tree = jax.tree.flatten(params[STACKED])
  blocks = {
    f"{STACKED}_{i}": tree.unflatten([leaf[i] for leaf in leaves])
    for i in range(len(leaves[0]))
  }
  return {**{k: v for k, v in params.items() if k != STACKED}, **blocks}


def _is_numpy(tree) -> bool:
  return all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def resize_params(params: Mapping, from_side: int, to_side: int) -> dict:
  """Parameters for another latent side, to fine-tune from.

  Only the bias tables depend on the side; positions are recomputed by the
  model. A table is a map over offsets -(g-1)..g-1 in rows and columns.
  CHOICE: offsets keep their share of the image, so the map is stretched with
  its corners and its centre fixed, bilinearly, which cannot overshoot.

  Args:
    params: parameters of a LatentDiffiT, scanned or not.
    from_side: its input_size.
    to_side: the new input_size.

  Returns:
    A new tree; leaves that do not change are shared.

  Raises:
    UserError: the tables are not of `from_side`, or the patches do not fit.
  """
  flat = traverse_util.flatten_dict(dict(params))
  tables = {path: v for path, v in flat.items() if path[-1] == BIAS_TABLE}
  for path, table in tables.items():
    grid = (round(table.shape[-2] ** 0.5) + 1) // 2
    if from_side % grid:
      raise UserError(
        f"{from_side=} does not fit a bias table of {grid}x{grid} tokens"
      )
    patch = from_side // grid
    if to_side < 1 or to_side % patch:
      raise UserError(f"{to_side=} is not a multiple of the patch size {patch}")
    flat[path] = resize_bias_table(table, grid, to_side // patch)
  return traverse_util.unflatten_dict(flat)


def resize_bias_table(
  table: jax.Array, from_grid: int, to_grid: int
) -> jax.Array:
  """[*b, (2 from_grid - 1)^2, heads] -> [*b, (2 to_grid - 1)^2, heads]."""
  if from_grid == to_grid:
    return table
  scale = (from_grid - 1) / max(to_grid - 1, 1)
  offsets = np.arange(1 - to_grid, to_grid) * scale
  knots = np.arange(1 - from_grid, from_grid)
  hat = np.maximum(0, 1 - np.abs(offsets[:, None] - knots))
  xp = np if isinstance(table, np.ndarray) else jnp
  hat = hat.astype(table.dtype)
  side = 2 * from_grid - 1
  table = table.reshape(*table.shape[:-2], side, side, table.shape[-1])
  table = xp.einsum("ai,bj,...ijh->...abh", hat, hat, table)
  return table.reshape(*table.shape[:-3], -1, table.shape[-1])


def macs(model: LatentDiffiT) -> dict[str, int]:
  """Multiply-accumulates of one forward pass of one sample.

  Args:
    model: only its sizes matter.

  Returns:
    By part: "linears" of the blocks' tokens, "time" projections of the blocks,
    "ends" (patches, time MLP, head), "attention" (the two products QK^T and
    AV); and the sums "without_attention", which is how the paper counts its
    114 G, and "with_attention", which is how it counts DiT's.
  """
  n, width = model.grid**2, model.hidden_dim
  hidden = round(model.mlp_ratio * width)
  patch = model.patch_size**2
  parts = {
    "linears": model.depth * n * (4 * width**2 + 2 * width * hidden),
    "time": model.depth * 3 * width**2,
    "ends": n * width * patch * (model.channels + model.out_channels)
    + width * (model.frequency_dim + width),
  }
  attention = 2 * model.depth * n**2 * width
  without = sum(parts.values())
  return {
    **parts,
    "attention": attention,
    "without_attention": without,
    "with_attention": without + attention,
  }
