"""EDM: how a network becomes a denoiser and is trained; also for VP and VE.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models" (arXiv 2206.00364), Table 1. With a clean image y, unit normal n and a
noise level sigma, the noisy image is x = y + sigma n, and a network F becomes
the denoiser

  D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                  (1)

Training draws one noise level per image and weighs the squared error so that
the error of F counts the same at every level, weight c_out^2 = 1:

  loss = weight |D(y + sigma n; sigma) - y|^2                        (2)

where |.|^2 is the sum over the image's elements, as in EDM's code: Adam hides
the factor, but gradient norms and loss curves show it. With s = sigma_data and
v = sigma^2 + s^2:

       c_skip, c_out, c_in             c_noise       sigma        weight
  edm  s^2/v, sigma s/v^1/2, v^-1/2    ln(sigma)/4   (3)          v/(sigma s)^2
  vp   1, -sigma, (sigma^2 + 1)^-1/2   999 t(sigma)  (4)          1/sigma^2
  ve   1, sigma, 1                     ln(sigma/2)   0.02 5000^u  1/sigma^2

  sigma    = exp(P_mean + P_std n)                                   (3)
  sigma(t) = sqrt(exp(b_d t^2 / 2 + b_min t) - 1),
             b_d = 19.9, b_min = 0.1                                 (4)
  t(sigma) = (sqrt(b_min^2 + 2 b_d ln(1 + sigma^2)) - b_min) / b_d   (5)
           = 2 ln(1 + sigma^2) / (sqrt(..) + b_min), where nothing cancels

with u uniform in [0, 1] and t in [1e-5, 1]. VP and VE are the settings of
Table 5 of the DiffiT paper. Coefficients, D and loss are float32 whatever the
network's dtype (float64 if float64 comes in).
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from diffit_jax.diffusion.arrays import at_least_float32, per_sample
from diffit_jax.errors import UserError

# See `kinds`.
FIELDS = ("precond", "sigma_data", "P_mean", "P_std", "augment_prob")
SOLVERS, ON_LATENTS = "edm", False

BETA_D, BETA_MIN, T_MIN = 19.9, 0.1, 1e-5
VE_MIN, VE_MAX = 0.02, 100.0


@dataclasses.dataclass(frozen=True)
class Process:
  """One row of the table; a diffusion as `kinds` has it.

  Attributes:
    coefficients: sigma [*b], in image units, > 0 -> c_skip, c_out, c_in,
      c_noise, [*b] each.
    sample_level: keys [b] -> sigma [b] float32 for training, each of its key.
    loss_weight: sigma [*b] -> weight [*b], in 1 / image unit^2.
  """

  coefficients: Callable[[jax.Array], tuple[jax.Array, ...]]
  sample_level: Callable[[jax.Array], jax.Array]
  loss_weight: Callable[[jax.Array], jax.Array]
  level = "sigma"  # its name among a training step's draws

  def denoise(
    self,
    network: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    sigma: jax.Array,
  ) -> jax.Array:
    """D(x; sigma), equation (1).

    Args:
      network: (c_in x [b, h, w, c], c_noise [b]) -> F [b, h, w, c], any dtype.
      x: [b, h, w, c] noisy images.
      sigma: [b].

    Returns:
      [b, h, w, c] float32, the expected clean images.
    """
    x = at_least_float32(x)
    c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
    F = network(per_sample(c_in) * x, c_noise).astype(x.dtype)
    return per_sample(c_skip) * x + per_sample(c_out) * F

  def loss(self, D: jax.Array, y: jax.Array, sigma: jax.Array) -> jax.Array:
    """(2) of D and y [b, h, w, c]: [b] float32; the batch loss is its mean."""
    error = at_least_float32(D) - at_least_float32(y)
    return self.loss_weight(sigma) * jnp.sum(error**2, axis=(1, 2, 3))

  def train_losses(
    self, network: Callable, y: jax.Array, sigma: jax.Array, noise: jax.Array
  ) -> jax.Array:
    """(2) of clean images y and their noise n; see `denoise` and `loss`."""
    x = y + per_sample(sigma) * noise
    return self.loss(self.denoise(network, x, sigma), y, sigma)


def make(config: Mapping) -> Process:
  """The process of a config.

  Args:
    config: `config.diffusion`; its `precond`, one of `PRECONDS`, is edm where
      it is missing. edm reads sigma_data (std of the training images), P_mean
      and P_std.
  """
  name = config.get("precond", "edm")
  if name not in PRECONDS:
    raise UserError(f"diffusion.precond={name!r}: use one of {(*PRECONDS,)}")
  return PRECONDS[name](config)


def _edm(config: Mapping) -> Process:
  sigma_data = config["sigma_data"]
  P_mean, P_std = config["P_mean"], config["P_std"]

  def coefficients(sigma):
    sigma = at_least_float32(sigma)
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / jnp.sqrt(variance)
    c_in = 1 / jnp.sqrt(variance)
    c_noise = jnp.log(sigma) / 4
    return c_skip, c_out, c_in, c_noise

  def sample_level(keys):
    n = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
    return jnp.exp(P_mean + P_std * n)  # (3)

  def loss_weight(sigma):
    sigma = at_least_float32(sigma)
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

  return Process(coefficients, sample_level, loss_weight)


def vp_sigma(t: jax.Array) -> jax.Array:
  """(4): [*b] times in (0, 1] -> noise levels."""
  return jnp.sqrt(jnp.expm1(0.5 * BETA_D * t**2 + BETA_MIN * t))


def vp_time(sigma: jax.Array) -> jax.Array:
  """(5), the inverse of (4)."""
  log = jnp.log1p(sigma**2)
  return 2 * log / (jnp.sqrt(BETA_MIN**2 + 2 * BETA_D * log) + BETA_MIN)


def _vp_coefficients(sigma):
  sigma = at_least_float32(sigma)
  c_in = 1 / jnp.sqrt(sigma**2 + 1)
  return jnp.ones_like(sigma), -sigma, c_in, 999 * vp_time(sigma)


def _ve_coefficients(sigma):
  sigma = at_least_float32(sigma)
  one = jnp.ones_like(sigma)
  return one, sigma, one, jnp.log(sigma / 2)


def _uniform(keys, low: float) -> jax.Array:
  draw = lambda key: jax.random.uniform(key, (), jnp.float32, low, 1.0)
  return jax.vmap(draw)(keys)


def _inverse_variance(sigma):
  return 1 / at_least_float32(sigma) ** 2


PRECONDS: dict[str, Callable[[Mapping], Process]] = {
  "edm": _edm,
  "vp": lambda config: Process(
    _vp_coefficients,
    lambda keys: vp_sigma(_uniform(keys, T_MIN)),
    _inverse_variance,
  ),
  "ve": lambda config: Process(
    _ve_coefficients,
    lambda keys: VE_MIN * (VE_MAX / VE_MIN) ** _uniform(keys, 0.0),
    _inverse_variance,
  ),
}
