"""Differences of nearly equal numbers, in float32, against float64 in numpy.

Each row is a formula that would lose digits at one end of its range if it were
written down as it is read. (The ADM loss has tests of its own.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import edm
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.evaluation import metrics
from diffit_jax.run import ema
from diffit_jax.sampling import dpmpp_2m, edm_heun
from diffit_jax.training import optimizer

SIGMA = np.geomspace(1e-3, 150, 60, dtype=np.float32)
TIME = np.geomspace(1e-5, 1, 60, dtype=np.float32)
LEVEL = np.linspace(0, 990, 60, dtype=np.float32)
STEP = np.array([1, 10, 1e3, 1e5, 3e6, 1e7], np.int32)
EDM = edm.make({"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2})
VP, VE = (edm.make({"precond": kind}) for kind in ("vp", "ve"))


def vp_time(sigma):
  return (-0.1 + np.sqrt(0.01 + 39.8 * np.log1p(sigma**2))) / 19.9


def power_gain(step):
  exponent = ema.gamma_of(0.05) + 1
  return -np.expm1(exponent * np.log1p(-1 / (step + 1)))


ROWS = {
  "vp time": (edm.vp_time, vp_time, SIGMA),
  "vp sigma": (
    edm.vp_sigma,
    lambda t: np.sqrt(np.expm1(9.95 * t**2 + 0.1 * t)),
    TIME,
  ),
  "vp c_noise": (
    lambda sigma: VP.coefficients(sigma)[3],
    lambda sigma: 999 * vp_time(sigma),
    SIGMA,
  ),
  "ve weight": (VE.loss_weight, lambda sigma: sigma**-2, SIGMA),
  "edm c_out": (
    lambda sigma: EDM.coefficients(sigma)[1],
    lambda sigma: sigma * 0.5 / np.sqrt(sigma**2 + 0.25),
    SIGMA,
  ),
  "edm weight": (
    EDM.loss_weight,
    lambda sigma: 1 / sigma**2 + 4.0,
    SIGMA,
  ),
  "guidance": (
    Guidance(1e6, schedule="power_cosine").scale_at,
    lambda t: 1 + (1e6 - 1) * np.sin(np.pi / 2 * (1 - t / 1000) ** 4) ** 2,
    LEVEL,
  ),
  "gain of a power average": (
    lambda step: ema.gain({"kind": "power", "sigma_rel": 0.05}, step, 8),
    power_gain,
    STEP,
  ),
  "gain of a half-life": (
    lambda step: ema.gain(
      {"kind": "halflife", "halflife_images": 3e8, "rampup_ratio": 9}, step, 8
    ),
    lambda step: -np.expm1(-np.log(2) * 8 / np.minimum(3e8, 72 * step)),
    STEP,
  ),
  "learning rate": (
    lambda step: optimizer.learning_rate(
      {"learning_rate": 3e-4, "rampup_images": 10**8}, step, 8
    ),
    lambda step: 3e-4 * np.minimum(step * 8 / 1e8, 1),
    STEP,
  ),
}


@pytest.mark.parametrize("name", ROWS)
def test_float32_keeps_its_digits(name):
  function, expected, x = ROWS[name]
  found = jax.jit(function)(jnp.asarray(x))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected(x.astype(np.float64)), rtol=2e-6)


def test_a_constant_decay_near_one():
  found = ema.gain({"kind": "constant", "decay": 1 - 1e-7}, 0, 8)
  np.testing.assert_allclose(found, 1e-7, rtol=1e-6)


@pytest.mark.parametrize("process", [EDM, VP, VE], ids=edm.PRECONDS)
def test_the_loss_of_denoised_images_at_little_noise(process):
  """D - y is a difference at the scale sigma of numbers of order 1.

  x itself is rounded by 6e-8, which is 3e-5 of sigma = 0.002: measured 8e-6 of
  the gradient's norm and 5e-7 of the loss.
  """
  rng = np.random.default_rng(5)
  y, n, F = np.float32(rng.normal(size=(3, 2, 16, 16, 3)) / 2)
  sigma = np.full(2, 0.002, np.float32)

  def loss(F, y, n, sigma):
    x = y + sigma[:, None, None, None] * n
    return process.loss(process.denoise(lambda *_: F, x, sigma), y, sigma).sum()

  found = jax.jit(jax.value_and_grad(loss))(F, y, n, sigma)
  with jax.enable_x64(True):
    args = [jnp.asarray(a, jnp.float64) for a in (F, y, n, sigma)]
    expected = jax.device_get(jax.value_and_grad(loss)(*args))
  np.testing.assert_allclose(found[0], expected[0], rtol=3e-6)
  off = np.linalg.norm(found[1] - expected[1]) / np.linalg.norm(expected[1])
  assert off < 3e-5


def test_tables_of_a_thousand_steps():
  """Steps of 1e-3 in alpha and sigma, against 18 digits."""
  wide = np.longdouble
  beta = np.linspace(1e-4, 2e-2, 1000).astype(wide)
  abar = np.append(np.cumprod(1 - beta)[::-1], wide(1))
  sigma, alpha = np.sqrt(1 - abar), np.sqrt(abar)
  rows = dpmpp_2m.make_solver(1000, spacing="uniform").rows
  expected = alpha[1:] - sigma[1:] / sigma[:-1] * alpha[:-1]
  np.testing.assert_allclose(rows["D"], expected.astype(float), rtol=1e-8)

  levels = edm_heun.noise_levels(1000).astype(wide)
  rows = edm_heun.make_solver(1000, S_churn=1e-3, S_noise=1.0).rows
  gamma = wide(1e-3) / 1000
  expected = levels[:-1] * np.sqrt(gamma * (2 + gamma))
  np.testing.assert_allclose(
    rows["added"][::2], expected.astype(float), rtol=1e-8
  )


def test_metrics_of_sets_that_hardly_differ():
  """Distances of 1e-10 beside traces of 8 and means of 100."""
  rng = np.random.default_rng(0)
  x = 100 + rng.normal(size=(400, 8))
  moments = lambda x: (x.mean(axis=0), np.cov(x.T))
  y = x + 1e-5
  found = metrics.frechet_distance(*moments(x), *moments(y))
  np.testing.assert_allclose(found, 8e-10, rtol=1e-3, atol=1e-12)
  score = metrics.inception_score(1e-4 * rng.normal(size=(400, 8)))
  assert 1 <= score < 1 + 1e-7
