"""Exponential moving averages of the parameters, by name.

  ema <- beta ema + (1 - beta) w

EDM (Karras et al. 2022) gives beta by a half-life in images that grows with the
images n seen before this step:

  h = min(halflife, rampup_ratio n),   beta = 0.5^(batch / max(h, 1e-8))

so that the first step has beta = 0 and copies the weights. Float32 throughout:
in bfloat16 a beta near 1 rounds to 1 and the average never moves.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError

KINDS = ("halflife", "constant")


def decay(config: Mapping, step: jax.Array, batch_size: int) -> jax.Array:
  """beta of one step, a float32 scalar.

  Args:
    config: kind "halflife" with halflife_images and rampup_ratio, or kind
      "constant" with decay.
    step: [] number of steps already taken.
    batch_size: images per step.
  """
  if config["kind"] == "constant":
    return jnp.float32(config["decay"])
  if config["kind"] != "halflife":
    raise UserError(f"ema kind {config['kind']!r}: use one of {KINDS}")
  num_images = jnp.asarray(step, jnp.float32) * batch_size
  halflife = jnp.minimum(
    config["halflife_images"], config["rampup_ratio"] * num_images
  )
  return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))


def update(ema, params, beta: jax.Array):
  """One step of the average over a tree; `params` are the new weights."""
  return jax.tree.map(lambda e, w: beta * e + (1 - beta) * w, ema, params)
