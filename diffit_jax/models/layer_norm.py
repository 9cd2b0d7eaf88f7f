"""LayerNorm without affine parameters, and its derivative in closed form.

  y  = (x - mean x) / s,  s = sqrt(var x + 1e-6)
  dy = (dx - mean dx - y mean(y dx)) / s

The backward pass keeps y, which the product that follows keeps anyway, and s.
"""

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Normalises over the last axis, with statistics in float32.

  Args:
    x: [..., c].
    dtype: of the result.

  Returns:
    Like x.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return _normalise(wide).astype(dtype)


@jax.custom_jvp
def _normalise(x: jax.Array) -> jax.Array:
  return _with_scale(x)[0]


def _with_scale(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """y and 1 / s."""
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(variance + 1e-6)
  return centred * scale, scale


@_normalise.defjvp
def _normalise_jvp(primals, tangents):
  (dx,) = tangents
  y, scale = _with_scale(*primals)
  # The order matters: the backward pass adds up the gradient of x in the
  # opposite one, and ends with y times something. XLA for CPU keeps such a sum
  # of two arrays. One that ends with a row's mean it computes again wherever it
  # is read, and with it, in a deep network, all sums before it.
  along_y = jnp.mean(y * dx, axis=-1, keepdims=True)
  return y, scale * (dx - jnp.mean(dx, axis=-1, keepdims=True) - y * along_y)
