"""LayerNorm without affine parameters, and its derivative in closed form.

  y  = (x - mean x) / s,  s = sqrt(var x + 1e-6)
  dy = (dx - mean dx - y mean(y dx)) / s

The backward pass keeps y, which the product that follows keeps anyway, and s.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Normalises over the last axis, with statistics in float32.

  Args:
    x: [..., c].
    dtype: type of the result.

  Returns:
    [..., c].
  """
  return _with_scale(x, dtype)[0]


def _with_scale(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
  """y and 1 / s."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(variance + 1e-6)
  return (centred * scale).astype(dtype), scale


@layer_norm.defjvp
def _layer_norm_jvp(dtype, primals, tangents):
  y, scale = _with_scale(*primals, dtype)

  def tangent(y, scale, dx):
    y, dx = y.astype(scale.dtype), dx.astype(scale.dtype)
    # The order matters: the backward pass adds up the gradient of x in the
    # opposite one, and ends with y times something. XLA for CPU keeps such a
    # sum of two arrays. One that ends with a row's mean it computes again
    # wherever it is read, and with it, in a deep network, all sums before it.
    along_y = jnp.mean(y * dx, axis=-1, keepdims=True)
    dy = scale * (dx - jnp.mean(dx, axis=-1, keepdims=True) - y * along_y)
    return dy.astype(dtype)

  # Without the checkpoint, the wide copy of y is what would be kept.
  return y, jax.checkpoint(tangent, prevent_cse=False)(y, scale, *tangents)
