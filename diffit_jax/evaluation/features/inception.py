"""The Inception-v3 of 2015 that FID is measured with.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision"
(arXiv 1512.00567), as trained for the graph classify_image_2015-12-05, from
which Heusel et al. (arXiv 1706.08500) take their features. It differs from the
Inception-v3 of today's model zoos:

  - 1008 classes, no auxiliary head;
  - the 3x3 average pool of a pool branch divides by the number of pixels
    inside the image, not by 9;
  - the pool branch of the last block takes the maximum instead;
  - batch normalisation has eps = 0.001 (`inception_weights` folds it, so a
    layer here is a convolution with bias and a ReLU).

Parameters are named as in the PyTorch port of that graph. Everything is at
full precision, in the dtype of the input.

Three things are done for speed, each exact in real numbers:

  - the average of a pool branch has weights that sum to 1, so it commutes with
    the 1x1 convolution and the bias after it, which leaves fewer channels to
    average: relu(pool(conv(x))) instead of relu(conv(pool(x)));
  - a 1x1 convolution is a matrix product;
  - an unpadded convolution computes one column too many and drops it: XLA's
    CPU backend is up to 2.6 times faster where there is padding, and the whole
    network 1.4 times, for 0.6% more products (`benchmarks/inception.py`).
"""

from typing import NamedTuple

import einops
from flax import linen as nn
import jax
import jax.numpy as jnp

SIDE = 299
POOL_DIM, NUM_LOGITS, SPATIAL_DIM = 2048, 1008, 2023
# The first channels of the first branch of that block: 17 * 17 * 7 = 2023.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
_PRECISION = jax.lax.Precision.HIGHEST


class Conv(NamedTuple):
  """A row of the tables below.

  Attributes:
    name: as in the file of weights.
    features: channels out.
    height, width: size of the kernel.
    stride: in both directions.
    padding: "SAME" is half the kernel on each side, "VALID" none.
    average: whether it reads the 3x3 average of its input.
  """

  name: str
  features: int
  height: int
  width: int
  stride: int = 1
  padding: str = "SAME"
  average: bool = False


class MaxPool(NamedTuple):
  """A row that is a 3x3 max pool."""

  stride: int
  padding: str


_HALVE = MaxPool(2, "VALID")


def _block_a(pooled: int) -> tuple:
  """35x35 to 35x35, with 224 + `pooled` channels."""
  return (
    (Conv("branch1x1", 64, 1, 1),),
    (Conv("branch5x5_1", 48, 1, 1), Conv("branch5x5_2", 64, 5, 5)),
    (
      Conv("branch3x3dbl_1", 64, 1, 1),
      Conv("branch3x3dbl_2", 96, 3, 3),
      Conv("branch3x3dbl_3", 96, 3, 3),
    ),
    (Conv("branch_pool", pooled, 1, 1, average=True),),
  )


def _block_b() -> tuple:
  """35x35 to 17x17."""
  return (
    (Conv("branch3x3", 384, 3, 3, 2, "VALID"),),
    (
      Conv("branch3x3dbl_1", 64, 1, 1),
      Conv("branch3x3dbl_2", 96, 3, 3),
      Conv("branch3x3dbl_3", 96, 3, 3, 2, "VALID"),
    ),
    (_HALVE,),
  )


def _block_c(c7: int) -> tuple:
  """17x17 to 17x17; 7x7 as 1x7 and 7x1, with `c7` channels between them."""
  return (
    (Conv("branch1x1", 192, 1, 1),),
    (
      Conv("branch7x7_1", c7, 1, 1),
      Conv("branch7x7_2", c7, 1, 7),
      Conv("branch7x7_3", 192, 7, 1),
    ),
    (
      Conv("branch7x7dbl_1", c7, 1, 1),
      Conv("branch7x7dbl_2", c7, 7, 1),
      Conv("branch7x7dbl_3", c7, 1, 7),
      Conv("branch7x7dbl_4", c7, 7, 1),
      Conv("branch7x7dbl_5", 192, 1, 7),
    ),
    (Conv("branch_pool", 192, 1, 1, average=True),),
  )


def _block_d() -> tuple:
  """17x17 to 8x8."""
  return (
    (
      Conv("branch3x3_1", 192, 1, 1),
      Conv("branch3x3_2", 320, 3, 3, 2, "VALID"),
    ),
    (
      Conv("branch7x7x3_1", 192, 1, 1),
      Conv("branch7x7x3_2", 192, 1, 7),
      Conv("branch7x7x3_3", 192, 7, 1),
      Conv("branch7x7x3_4", 192, 3, 3, 2, "VALID"),
    ),
    (_HALVE,),
  )


def _block_e(*pool_branch: Conv | MaxPool) -> tuple:
  """8x8 to 8x8; two branches end in a fork, whose parts are joined."""
  return (
    (Conv("branch1x1", 320, 1, 1),),
    (
      Conv("branch3x3_1", 384, 1, 1),
      (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1)),
    ),
    (
      Conv("branch3x3dbl_1", 448, 1, 1),
      Conv("branch3x3dbl_2", 384, 3, 3),
      (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1)),
    ),
    pool_branch,
  )


# Sizes 299 -> 149, 147, 147, 73, 73, 71, 35.
STEM = (
  Conv("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"),
  Conv("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
  Conv("Conv2d_2b_3x3", 64, 3, 3),
  _HALVE,
  Conv("Conv2d_3b_1x1", 80, 1, 1),
  Conv("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
  _HALVE,
)
BLOCKS = {
  "Mixed_5b": _block_a(32),
  "Mixed_5c": _block_a(64),
  "Mixed_5d": _block_a(64),
  "Mixed_6a": _block_b(),
  "Mixed_6b": _block_c(128),
  "Mixed_6c": _block_c(160),
  "Mixed_6d": _block_c(160),
  "Mixed_6e": _block_c(192),
  "Mixed_7a": _block_d(),
  "Mixed_7b": _block_e(Conv("branch_pool", 192, 1, 1, average=True)),
  "Mixed_7c": _block_e(MaxPool(1, "SAME"), Conv("branch_pool", 192, 1, 1)),
}


def average_pool(x: jax.Array) -> jax.Array:
  """3x3 means of [b, h, w, c] over the pixels inside the image."""
  return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def convolve(
  x: jax.Array, kernel: jax.Array, stride: int, padding: str
) -> jax.Array:
  """[b, h, w, c] with [kh, kw, c, d] to [b, h', w', d], full precision."""
  if kernel.shape[:2] == (1, 1):
    return jnp.einsum("bhwc,cd->bhwd", x, kernel[0, 0], precision=_PRECISION)
  one_column_more = [(0, 0), (0, stride)]
  y = jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME" if padding == "SAME" else one_column_more,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=_PRECISION,
  )
  return y if padding == "SAME" else y[:, :, :-1]


class ConvReLU(nn.Module):
  """A convolution with bias, the average pool if any, and a ReLU."""

  spec: Conv

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    _, features, height, width, stride, padding, average = self.spec
    shape = (height, width, x.shape[-1], features)
    zeros = nn.initializers.zeros
    kernel = self.param("kernel", zeros, shape, jnp.float32)
    bias = self.param("bias", zeros, (features,), jnp.float32)
    y = convolve(x, kernel, stride, padding) + bias
    return nn.relu(average_pool(y) if average else y)


def _step(step: Conv | MaxPool | tuple, x: jax.Array) -> list[jax.Array]:
  """One step of a branch, called in a compact method; a fork gives several."""
  if isinstance(step, MaxPool):
    return [nn.max_pool(x, (3, 3), (step.stride,) * 2, step.padding)]
  if isinstance(step, Conv):
    return [ConvReLU(step, name=step.name)(x)]
  return [ConvReLU(part, name=part.name)(x) for part in step]


class Block(nn.Module):
  """Branches side by side, concatenated in the order of the table."""

  branches: tuple

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """Returns the block's output and that of each branch."""
    outputs = []
    for branch in self.branches:
      ends = [x]
      for step in branch:
        (last,) = ends
        ends = _step(step, last)
      outputs += ends
    return jnp.concatenate(outputs, -1), outputs


class Inception(nn.Module):
  """The features of normalised images."""

  @nn.compact
  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    """Runs the network.

    Args:
      x: [b, 299, 299, 3] floats as `resize.prepare` gives them.

    Returns:
      pool [b, 2048]; logits [b, 1008], without the bias, as the inception
      score has them; and spatial [b, 2023], for sFID: the first 7 channels of
      Mixed_6d.branch1x1 in the order (h, w, c). All in the dtype of x.
    """
    for step in STEM:
      (x,) = _step(step, x)
    for name, branches in BLOCKS.items():
      x, outputs = Block(branches, name=name)(x)
      if name == SPATIAL_BLOCK:
        spatial = outputs[0][..., :SPATIAL_CHANNELS]
    pool = jnp.mean(x, (1, 2))
    fc = nn.Dense(NUM_LOGITS, use_bias=False, precision=_PRECISION, name="fc")
    return {
      "pool": pool,
      "logits": fc(pool),
      "spatial": einops.rearrange(spatial, "b h w c -> b (h w c)"),
    }
