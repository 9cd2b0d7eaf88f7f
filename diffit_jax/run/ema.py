"""Exponential moving averages of the parameters, by name.

  ema <- ema + gain (w - ema),   gain = 1 - beta                           (1)

A constant beta forgets at one rate. EDM (Karras et al. 2022) gives it by a
half-life in images that grows with the images n seen before this step:

  h = min(halflife, rampup_ratio n),   beta = 0.5^(batch / max(h, 1e-8))   (2)

so that the first step has beta = 0 and copies the weights. The power-function
average (Karras et al. 2024, "Analyzing and improving the training dynamics of
diffusion models", Section 3.1) weighs the weights of time tau of a run of
length t by

  p(tau; gamma, t) = (gamma + 1) tau^gamma / t^(gamma + 1)                 (3)

a profile that keeps its shape as the run gets longer. Its standard deviation is
the share of the run, sigma_rel, that the config gives:

  sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))                  (4)

Splitting the integral of (3) at t - 1 gives its update at step t = 1, 2, ..:

  beta = (1 - 1/t)^(gamma + 1)                                             (5)

Written out, the weights of step s then count for

  (1 - beta_s) prod_(r = s+1..t) beta_r = (s^(gamma+1) - (s-1)^(gamma+1))
    / t^(gamma+1) = integral of (3) over s-1 < tau <= s                    (6)

so (5) is exactly (3) for weights that stay what they are between two steps.

All in float32, and in terms of the gain: near 1, float32 has beta in steps of
6e-8, which is 0.3 % of the gain after a million steps of gamma = 17; and (1)
never loses a part of the sum, as beta ema + (1 - beta) w does by rounding.
"""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

KINDS = {  # with the fields of each
  "halflife": ("halflife_images", "rampup_ratio"),
  "constant": ("decay",),
  "power": ("sigma_rel",),
}
MAX_SIGMA_REL = 12**-0.5  # gamma = 0: the plain mean of all steps


def gamma_of(sigma_rel: float) -> float:
  """The exponent of the profile (3) with a given width (4).

  Args:
    sigma_rel: in (0, 12^-0.5]; 0.05 and 0.10 are the paper's widths to track.

  Raises:
    UserError: another width.
  """
  if not 0 < sigma_rel <= MAX_SIGMA_REL:
    raise UserError(
      f"sigma_rel={sigma_rel} must be above 0 and at most"
      f" {MAX_SIGMA_REL:.4f}, the width of the plain mean"
    )
  # (4) multiplied out, with s = sigma_rel^-2.
  s = sigma_rel**-2
  return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def gain(config: Mapping, step: jax.Array, batch_size: int) -> jax.Array:
  """1 - beta of one step, a float32 scalar.

  Args:
    config: kind "halflife" with halflife_images and rampup_ratio, kind
      "constant" with decay, or kind "power" with sigma_rel.
    step: [] number of steps already taken.
    batch_size: images per step.
  """
  if config["kind"] == "constant":
    return jnp.float32(1 - config["decay"])
  step = jnp.asarray(step, jnp.float32)
  if config["kind"] == "power":
    exponent = np.float32(gamma_of(config["sigma_rel"]) + 1)
    return -jnp.expm1(exponent * jnp.log1p(-1 / (step + 1)))
  if config["kind"] != "halflife":
    raise UserError(f"ema kind {config['kind']!r}: use one of {tuple(KINDS)}")
  halflife = jnp.minimum(
    config["halflife_images"], config["rampup_ratio"] * step * batch_size
  )
  log_beta = -math.log(2) * batch_size / jnp.maximum(halflife, 1e-8)
  return -jnp.expm1(log_beta)


def decay(config: Mapping, step: jax.Array, batch_size: int) -> jax.Array:
  """beta of one step, to be read by people; arguments as in `gain`."""
  return 1 - gain(config, step, batch_size)


def update(ema, params, gain: jax.Array):
  """One step (1) of the average over a tree; `params` are the new weights."""
  # A gain of 1 copies: e + (w - e) is w but for rounding.
  move = lambda e, w: jnp.where(gain == 1, w, e + gain * (w - e))
  return jax.tree.map(move, ema, params)


def power_averages(config: Mapping[str, Mapping]) -> dict[str, float]:
  """{name: sigma_rel} of the power-function averages among a config's."""
  return {
    name: float(rule["sigma_rel"])
    for name, rule in sorted(config.items())
    if rule["kind"] == "power"
  }
