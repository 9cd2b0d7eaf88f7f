"""EDM: preconditioning, noise levels and loss of the image-space model.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364), Table 1. With a clean image y, unit normal n and a
noise level sigma, the noisy image is x = y + sigma n, and a network F becomes
the denoiser

  D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                  (1)
    c_skip  = sigma_data^2 / (sigma^2 + sigma_data^2)
    c_out   = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
    c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
    c_noise = ln(sigma) / 4

Training draws one noise level per image and weighs the squared error so that
the error of F counts the same at every level, lambda c_out^2 = 1:

  sigma  = exp(P_mean + P_std n)                                     (2)
  lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2           (3)
  loss   = lambda |D(y + sigma n; sigma) - y|^2                      (4)

where |.|^2 is the sum over the image's elements, as in EDM's code: Adam hides
the factor, but gradient norms and loss curves show it. Coefficients, D and loss
are float32 whatever the network's dtype (float64 if float64 comes in).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def precondition(
  sigma: jax.Array, sigma_data: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The coefficients of (1).

  Args:
    sigma: [*b] noise std in image units, > 0.
    sigma_data: std of the training images, same unit.

  Returns:
    c_skip, c_out, c_in, c_noise: [*b] each, float32.
  """
  sigma = at_least_float32(sigma)
  variance = sigma**2 + sigma_data**2
  c_skip = sigma_data**2 / variance
  c_out = sigma * sigma_data / jnp.sqrt(variance)
  c_in = 1 / jnp.sqrt(variance)
  c_noise = jnp.log(sigma) / 4
  return c_skip, c_out, c_in, c_noise


def combine(
  network: Callable[[jax.Array, jax.Array], jax.Array],
  x: jax.Array,
  coefficients: tuple[jax.Array, ...],
) -> jax.Array:
  """D(x; sigma), equation (1), for any coefficients; see `precond.Precond`.

  Args:
    network: (c_in x [b, h, w, c], c_noise [b]) -> F [b, h, w, c], any dtype.
    x: [b, h, w, c] noisy images.
    coefficients: c_skip, c_out, c_in, c_noise, [b] each.

  Returns:
    [b, h, w, c] float32, the expected clean images.
  """
  x = at_least_float32(x)
  c_skip, c_out, c_in, c_noise = coefficients
  F = network(_per_image(c_in) * x, c_noise).astype(x.dtype)
  return _per_image(c_skip) * x + _per_image(c_out) * F


def sample_sigma(keys: jax.Array, *, P_mean: float, P_std: float) -> jax.Array:
  """Training noise levels (2), one per image: keys [b] -> sigma [b]."""
  n = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
  return jnp.exp(P_mean + P_std * n)


def loss_weight(sigma: jax.Array, sigma_data: float) -> jax.Array:
  """lambda of (3): [*b] noise std -> [*b] float32, in 1 / image unit^2."""
  sigma = at_least_float32(sigma)
  return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def weighted_error(D: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
  """The squared error (4), summed over each image.

  Args:
    D: [b, h, w, c] denoised images.
    y: [b, h, w, c] clean (augmented) images.
    weight: [b].

  Returns:
    [b] float32; the batch loss is its mean.
  """
  error = at_least_float32(D) - at_least_float32(y)
  return weight * jnp.sum(error**2, axis=(1, 2, 3))


def learning_rate_factor(
  num_images_seen: jax.Array | int, rampup_images: int
) -> jax.Array:
  """Linear warm-up: min(num_images_seen / rampup_images, 1), float32.

  Counted in images seen before the step, so that the first step has rate 0.
  A ramp of 0 images is none.
  """
  seen = jnp.asarray(num_images_seen, jnp.float32)
  if rampup_images == 0:
    return jnp.ones_like(seen)
  return jnp.minimum(seen / rampup_images, 1)


def at_least_float32(x: jax.Array) -> jax.Array:
  """The array in float32, or in what is finer."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_image(coefficient: jax.Array) -> jax.Array:
  return coefficient[:, None, None, None]
