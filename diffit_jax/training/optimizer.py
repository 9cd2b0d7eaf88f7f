"""Adam or AdamW as the config says, with EDM's ramp and gradient rule."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from diffit_jax.errors import UserError

NAMES = ("adam", "adamw")


def learning_rate(
  config: Mapping, step: jax.Array, batch_size: int
) -> jax.Array:
  """Learning rate of one step: a linear ramp over images seen, then constant.

  Args:
    config: learning_rate and rampup_images (0 for no ramp).
    step: [] number of steps already taken.
    batch_size: images per step.

  Returns:
    [] float32; 0 at the first step of a ramp.
  """
  rate, rampup = jnp.float32(config["learning_rate"]), config["rampup_images"]
  num_images = jnp.asarray(step, jnp.float32) * batch_size
  return rate * jnp.minimum(num_images / rampup, 1) if rampup else rate


def sanitise(gradients):
  """EDM's rule, elementwise: NaN -> 0, +inf -> 1e5, -inf -> -1e5."""
  return jax.tree.map(
    lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), gradients
  )


def make_optimizer(
  config: Mapping, batch_size: int
) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`.

  Args:
    config: name, learning_rate, rampup_images, b1, b2, eps, weight_decay,
      clip_norm (0 for none) and sanitise_gradients.
    batch_size: images per step, for the ramp.
  """
  if config["name"] not in NAMES:
    raise UserError(f"optimizer.name={config['name']!r}: use one of {NAMES}")
  decoupled = config["name"] == "adamw"
  if config["weight_decay"] and not decoupled:
    raise UserError(
      f"optimizer.weight_decay={config['weight_decay']} has no effect on"
      " adam: set it to 0 or use optimizer.name=adamw"
    )
  schedule = lambda step: learning_rate(config, step, batch_size)
  moments = dict(b1=config["b1"], b2=config["b2"], eps=config["eps"])
  steps = []
  if config["sanitise_gradients"]:
    steps.append(optax.stateless(lambda updates, _: sanitise(updates)))
  if config["clip_norm"]:
    steps.append(optax.clip_by_global_norm(config["clip_norm"]))
  if decoupled:
    steps.append(
      optax.adamw(schedule, weight_decay=config["weight_decay"], **moments)
    )
  else:
    steps.append(optax.adam(schedule, **moments))
  return optax.chain(*steps)
