"""The type and the shape in which the formulas take their arrays."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
  """The array in float32, or in what is finer."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def per_sample(x: jax.Array) -> jax.Array:
  """[b] -> [b, 1, 1, 1], to multiply images or latents."""
  return x[:, None, None, None]
