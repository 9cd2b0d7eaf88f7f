"""Linear maps, whose product is one of two matrices.

On a grid of tokens [b, h, w, c], the gradient of the kernel contracts three
axes. XLA for CPU transposes the tokens for that; of matrices it does not, and
the two products of the backward pass take 0.7 of the time (1024 tokens, 1152 to
4608 wide, 2 cores).
"""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

XAVIER = nn.initializers.xavier_uniform()


def linear(
  features: int,
  dtype: jnp.dtype,
  name: str,
  init: nn.initializers.Initializer = XAVIER,
) -> nn.Dense:
  """A linear map of the last axis, with a bias vector, to `features`."""
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=init,
    dot_general=flat_dot_general,
    name=name,
  )


def flat_dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None
) -> jax.Array:
  """`jax.lax.dot_general` for `nn.Dense(dot_general=...)`.

  Args:
    x: [..., c].
    kernel: [c, features].
    dimension_numbers: the contraction of x's last axis with kernel's first.
    precision: precision of the product.

  Returns:
    [..., features].
  """
  assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
  *lead, width = x.shape
  flat = x.reshape(math.prod(lead), width)
  out = jax.lax.dot_general(
    flat, kernel, (((1,), (0,)), ((), ())), precision=precision
  )
  return out.reshape(*lead, kernel.shape[-1])
