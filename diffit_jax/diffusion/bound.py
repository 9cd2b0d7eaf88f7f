"""The parts of ADM's variational bound: a divergence, and a bin's mass.

Both take the difference of two means, never the means: it cancels no digits
where they are near (see `adm`). The normal distribution function in the mass is
taken to be a tanh, as in the published loss, hence the logistic function s of

  z(x) = 2 sqrt(2/pi) (x + 0.044715 x^3),                            (1)

and for the edges u > l of a bin, in standard deviations, a = z(u), b = z(l),

  ln(s(a) - s(b)) = ln s(a) + ln s(-b) + ln(1 - e^(b-a))             (2)
  a - b = 2 sqrt(2/pi) (u - l) (1 + 0.044715 (u^2 + u l + l^2)).     (3)
"""

import math

import jax
import jax.numpy as jnp

_LOGIT, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # of (1)
_LEAST_LOG_MASS = math.log(1e-12)


def normal_kl(
  difference: jax.Array, log_variance_1: jax.Array, log_variance_2: jax.Array
) -> jax.Array:
  """KL(N(m1, e^l1) | N(m2, e^l2)) in nats from m1 - m2, l1 and l2."""
  return 0.5 * (
    _beyond_linear(log_variance_2 - log_variance_1)
    + difference**2 * jnp.exp(-log_variance_2)
  )


_SERIES = [(-1) ** k / math.factorial(k) for k in range(13, 1, -1)] + [0, 0]


@jax.custom_jvp
def _beyond_linear(x: jax.Array) -> jax.Array:
  """e^-x - 1 + x, about x^2 / 2, and its gradient 1 - e^-x, with all digits."""
  small = jnp.polyval(jnp.asarray(_SERIES, x.dtype), x)
  return jnp.where(jnp.abs(x) < 1, small, jnp.expm1(-x) + x)


@_beyond_linear.defjvp
def _beyond_linear_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  return _beyond_linear(x), -jnp.expm1(-x) * dx


def discretized_log_likelihood(
  x0: jax.Array,
  difference: jax.Array,
  log_variance: jax.Array,
  unit: jax.Array | float = 1.0,
) -> jax.Array:
  """ln of the mass that N(mean, e^log_variance) puts on x0's bin, in nats.

  Bins are x0 +- 1/255; beyond +-0.999 they reach to infinity. The logarithm is
  at least that of 1e-12. In logarithms (2) nothing cancels, however small the
  mass; nor does it in b - a, of which only the factored form (3) is computed.

  Args:
    x0: [b, h, w, c].
    difference: [b, h, w, c] x0 - mean, in units of `unit`.
    log_variance: [b, h, w, c], in units of its square.
    unit: [b, 1, 1, 1] or a number.
  """
  scale = jnp.exp(-0.5 * log_variance)
  middle, half = scale * difference, scale / (255 * unit)
  upper, lower = _logit(middle + half), _logit(middle - half)
  width = 2 * half * _LOGIT * (1 + _CUBIC * (3 * middle**2 + half**2))  # (3)
  # Every part is finite in every bin, so that no gradient is 0 times infinity.
  log_mass = (
    jnp.where(x0 > 0.999, 0, jax.nn.log_sigmoid(upper))
    + jnp.where(x0 < -0.999, 0, jax.nn.log_sigmoid(-lower))
    + jnp.where(jnp.abs(x0) > 0.999, 0, jax.nn.log1mexp(width))
  )
  return jnp.maximum(log_mass, _LEAST_LOG_MASS)


def _logit(x: jax.Array) -> jax.Array:
  """z of (1)."""
  return _LOGIT * (x + _CUBIC * x**3)
