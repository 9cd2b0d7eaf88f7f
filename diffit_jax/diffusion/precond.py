"""How a network becomes a denoiser: EDM's way, and those of VP and VE.

Karras et al. 2022 (arXiv 2206.00364), Table 1. With D = c_skip x + c_out
F(c_in x; c_noise), and the training's noise levels and weights:

       c_skip, c_out, c_in       c_noise            sigma in training     weight
  edm  see `edm`                 ln(sigma) / 4      exp(P_mean + P_std n)  (3)
  vp   1, -sigma, (s^2 + 1)^-1/2 999 t(sigma)       sigma(t)         1 / sigma^2
  ve   1, sigma, 1               ln(sigma / 2)      0.02 5000^u      1 / sigma^2

with u uniform in [0, 1], t in [1e-5, 1], and for VP

  sigma(t) = sqrt(exp(b_d t^2 / 2 + b_min t) - 1),  b_d = 19.9, b_min = 0.1  (1)
  t(sigma) = (sqrt(b_min^2 + 2 b_d ln(1 + sigma^2)) - b_min) / b_d           (2)
           = 2 ln(1 + sigma^2) / (sqrt(..) + b_min), where nothing cancels

VP and VE are the settings of Table 5 of the DiffiT paper.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffit_jax.diffusion import edm
from diffit_jax.errors import UserError

KINDS = ("edm", "vp", "ve")
BETA_D, BETA_MIN, T_MIN = 19.9, 0.1, 1e-5
VE_MIN, VE_MAX = 0.02, 100.0


@dataclasses.dataclass(frozen=True)
class Precond:
  """One row of the table.

  Attributes:
    coefficients: sigma [*b] -> c_skip, c_out, c_in, c_noise, [*b] each.
    sample_sigma: keys [b] -> sigma [b] for training.
    loss_weight: sigma [*b] -> weight of the squared error [*b].
  """

  coefficients: Callable[[jax.Array], tuple[jax.Array, ...]]
  sample_sigma: Callable[[jax.Array], jax.Array]
  loss_weight: Callable[[jax.Array], jax.Array]

  def denoise(self, network, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """D(x; sigma) of x [b, h, w, c] and sigma [b]; network as `edm.combine`."""
    return edm.combine(network, x, self.coefficients(sigma))

  def loss(self, D: jax.Array, y: jax.Array, sigma: jax.Array) -> jax.Array:
    """[b] weighted squared error, summed over each image."""
    return edm.weighted_error(D, y, self.loss_weight(sigma))


def make(config: Mapping) -> Precond:
  """The preconditioning of a config.

  Args:
    config: `config.diffusion`; its `precond`, one of KINDS, is edm where it is
      missing. edm reads sigma_data, P_mean and P_std.
  """
  kind = config.get("precond", "edm")
  if kind == "edm":
    sigma_data = config["sigma_data"]
    return Precond(
      functools.partial(edm.precondition, sigma_data=sigma_data),
      functools.partial(
        edm.sample_sigma, P_mean=config["P_mean"], P_std=config["P_std"]
      ),
      functools.partial(edm.loss_weight, sigma_data=sigma_data),
    )
  if kind == "vp":
    return Precond(_vp_coefficients, _vp_sigma, _inverse_variance)
  if kind == "ve":
    return Precond(_ve_coefficients, _ve_sigma, _inverse_variance)
  raise UserError(f"diffusion.precond={kind!r}: use one of {KINDS}")


def vp_sigma(t: jax.Array) -> jax.Array:
  """(1): [*b] times in (0, 1] -> noise levels."""
  return jnp.sqrt(jnp.expm1(0.5 * BETA_D * t**2 + BETA_MIN * t))


def vp_time(sigma: jax.Array) -> jax.Array:
  """(2), the inverse of (1)."""
  log = jnp.log1p(sigma**2)
  return 2 * log / (jnp.sqrt(BETA_MIN**2 + 2 * BETA_D * log) + BETA_MIN)


def _vp_coefficients(sigma):
  sigma = edm.at_least_float32(sigma)
  c_in = 1 / jnp.sqrt(sigma**2 + 1)
  return jnp.ones_like(sigma), -sigma, c_in, 999 * vp_time(sigma)


def _ve_coefficients(sigma):
  sigma = edm.at_least_float32(sigma)
  one = jnp.ones_like(sigma)
  return one, sigma, one, jnp.log(sigma / 2)


def _uniform(keys, low: float) -> jax.Array:
  draw = lambda key: jax.random.uniform(key, (), jnp.float32, low, 1.0)
  return jax.vmap(draw)(keys)


def _vp_sigma(keys):
  return vp_sigma(_uniform(keys, T_MIN))


def _ve_sigma(keys):
  return VE_MIN * (VE_MAX / VE_MIN) ** _uniform(keys, 0.0)


def _inverse_variance(sigma):
  return 1 / edm.at_least_float32(sigma) ** 2
