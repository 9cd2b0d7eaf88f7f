"""Comparing networks that were trained on different devices."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_same_network(model, a, b):
  """Outputs to 1e-5, parameters to 5e-5 but for those without a gradient."""
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  run = jax.jit(lambda tree: model.apply({"params": tree}, x, jnp.zeros(4)))
  np.testing.assert_allclose(run(a), run(b), atol=1e-5)
  jax.tree_util.tree_map_with_path(
    lambda path, a, b: np.testing.assert_allclose(
      _without_gradient_free_rows(path, a),
      _without_gradient_free_rows(path, b),
      atol=5e-5,
    ),
    a,
    b,
  )


def _without_gradient_free_rows(path, leaf):
  """Drops what cancels in the softmax: biases and time weights of the keys.

  Their gradient is rounding noise, which Adam turns into steps of full size.
  """
  names = [key.key for key in path]
  leaf = np.array(leaf)
  if names[-2] == "qkv_temb" or names[-2:] == ["qkv", "bias"]:
    third = leaf.shape[-1] // 3
    leaf[..., third : 2 * third] = 0
  return leaf
