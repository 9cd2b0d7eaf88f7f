"""Problems with known answers for the latent solvers, from ADM tables alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BETAS = np.linspace(1e-4, 2e-2, 1000)
ABAR = np.cumprod(1 - BETAS)
SHAPE = (3, 2, 2, 2)


def noise_of(seed=0, shape=SHAPE):
  return np.random.default_rng(seed).normal(size=shape)


def mixture_eps(x, abar, means, stds, weights, xp=np):
  """E[eps | x] for clean data from a mixture of normals, element by element."""
  means, stds, weights = map(np.asarray, (means, stds, weights))
  x, abar = x[..., None], abar[..., None]
  variance = abar * stds**2 + 1 - abar
  distance = x - xp.sqrt(abar) * means
  log_p = np.log(weights) - (xp.log(variance) + distance**2 / variance) / 2
  p = xp.exp(log_p - log_p.max(axis=-1, keepdims=True))
  p = p / p.sum(axis=-1, keepdims=True)
  return (p * xp.sqrt(1 - abar) * distance / variance).sum(axis=-1)


TWO_NORMALS = dict(means=[-0.8, 0.5], stds=[0.3, 0.5], weights=[0.4, 0.6])


def normal(mean, std):
  return dict(means=[mean], stds=[std], weights=[1.0])


def denoiser_of(data):
  """The exact (x, t [b]) -> eps; ln abar is interpolated between steps."""

  def denoiser(x, t):
    log_abar = jnp.interp(t.astype(x.dtype), np.arange(1000.0), np.log(ABAR))
    abar = jnp.exp(log_abar)[:, None, None, None]
    return mixture_eps(x, abar, **data, xp=jnp)

  return denoiser


@functools.cache
def trajectory_end(shape=SHAPE, steps=2000):
  """Where the ODE takes noise_of(0, shape), and x_0 predicted there.

  From t = 999 to t = 0, for data from `TWO_NORMALS`.
  With lambda = ln(alpha / sigma), d(x / sigma)/dlambda = e^lambda x_0(x): the
  classical Runge-Kutta method, whose error at 2000 steps is below 1e-10.
  """
  ends = np.log(ABAR[[999, 0]] / (1 - ABAR[[999, 0]])) / 2

  def x_and_x0(y, half_log_snr):
    abar = np.asarray(1 / (1 + np.exp(-2 * half_log_snr)))
    x = y * np.sqrt(1 - abar)
    eps = mixture_eps(x, abar, **TWO_NORMALS)
    return x, (x - np.sqrt(1 - abar) * eps) / np.sqrt(abar)

  slope = lambda y, at: np.exp(at) * x_and_x0(y, at)[1]
  h = (ends[1] - ends[0]) / steps
  y = noise_of(0, shape) / np.sqrt(1 - ABAR[999])
  for at in ends[0] + h * np.arange(steps):
    k1 = slope(y, at)
    k2 = slope(y + h / 2 * k1, at + h / 2)
    k3 = slope(y + h / 2 * k2, at + h / 2)
    k4 = slope(y + h * k3, at + h)
    y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
  return x_and_x0(y, ends[1])[1]


def measured_orders(run, end, steps):
  """log2 of the ratios of errors; `steps` should halve the step's length."""
  errors = [np.abs(run(n) - end).max() for n in steps]
  return np.log2(np.divide(errors[:-1], errors[1:]))


def curved(x, t, xp=jnp):
  """A network that is no line, so that every mistake shows: eps and v."""
  x = xp.asarray(x)
  t = xp.asarray(t).reshape(-1, 1, 1, 1) / 1000
  eps = xp.sin(x) * (1.2 - t) + t * x
  return xp.concatenate([eps, xp.cos(3 * x + t)], axis=-1)


def traced_calls(run):
  """What (denoiser) -> samples shows its denoiser while it is compiled."""
  calls = []

  def denoiser(x, t):
    calls.append((x.shape, x.dtype, t.shape, t.dtype))
    return curved(x, t)

  jax.jit(lambda: run(denoiser))()
  return calls
