"""EDM's coefficients, noise, loss and ramp against identities and goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import edm, precond

SIGMA_DATA = 0.5
PROCESS = precond.make({"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2})
SIGMAS = np.float32([0.002, 0.02, 0.1, 0.5, 1.0, 7.0, 80.0])
# A handful of float32 roundings (6e-8 each) of numbers of order one.
ROUNDING = 5e-7


def test_output_scale_times_weight_is_one():
  _, c_out, _, _ = edm.precondition(SIGMAS, SIGMA_DATA)
  weight = edm.loss_weight(SIGMAS, SIGMA_DATA)
  np.testing.assert_allclose(c_out**2 * weight, 1, rtol=ROUNDING)


def test_network_sees_and_answers_unit_variance():
  c_skip, c_out, c_in, _ = edm.precondition(SIGMAS, SIGMA_DATA)
  # Var(c_in x), and Var(F) for the F that gives D = y: (y - c_skip x) / c_out.
  input_variance = c_in**2 * (SIGMA_DATA**2 + SIGMAS**2)
  target_variance = (
    (1 - np.float64(c_skip)) ** 2 * SIGMA_DATA**2 + (c_skip * SIGMAS) ** 2
  ) / c_out**2
  np.testing.assert_allclose(input_variance, 1, rtol=ROUNDING)
  # 1 - c_skip loses digits at small sigma, where it is about 1.6e-5 and more.
  np.testing.assert_allclose(target_variance, 1, rtol=1e-5)


@pytest.mark.parametrize(  # EDM in GOLDENS.md
  "sigma, expected",
  [
    (0.1, (0.96153846, 0.098058068, 1.9611613514, -0.5756462732, 104)),
    (0.5, (0.5, 0.3535533906, 1.4142135624, -0.1732867951, 8)),
    (1.0, (0.2, 0.4472135955, 0.894427191, 0, 5)),
    (
      80.0,
      (3.906097418e-5, 0.4999902347, 0.01249975587, 1.0955066587, 4.00015625),
    ),
  ],
)
def test_coefficients(sigma, expected):
  *coefficients, weight = (
    *edm.precondition(jnp.float32(sigma), SIGMA_DATA),
    edm.loss_weight(jnp.float32(sigma), SIGMA_DATA),
  )
  assert all(c.dtype == jnp.float32 for c in coefficients)
  np.testing.assert_allclose(
    [*coefficients, weight], expected, rtol=ROUNDING, atol=1e-9
  )


def test_coefficients_are_float32_for_bfloat16_noise_levels():
  assert edm.precondition(jnp.bfloat16(1), 0.5)[0].dtype == jnp.float32


def test_denoiser_of_gaussian_data():
  # For y ~ N(0, s^2), E[y | x] = s^2 x / (s^2 + sigma^2), which is c_skip x if
  # s = sigma_data: the best F is 0. For any s the best F is linear in c_in x.
  s, sigma = 0.8, jnp.float32([0.05, 1.3])
  x = jnp.sin(jnp.arange(2 * 3 * 4 * 2.0)).reshape(2, 3, 4, 2)
  exact = s**2 * x / (s**2 + sigma**2)[:, None, None, None]
  c_skip, c_out, c_in, _ = edm.precondition(sigma, SIGMA_DATA)
  slope = (s**2 / (s**2 + sigma**2) - c_skip) / (c_out * c_in)

  def network(x_in, c_noise):
    np.testing.assert_allclose(c_noise, jnp.log(sigma) / 4)
    return slope[:, None, None, None] * x_in

  D = PROCESS.denoise(network, x, sigma)
  np.testing.assert_allclose(D, exact, rtol=2e-6, atol=2e-7)
  zero = PROCESS.denoise(lambda x_in, _: 0 * x_in, x, sigma)
  np.testing.assert_allclose(zero, c_skip[:, None, None, None] * x)


def test_bfloat16_network_is_combined_in_float32():
  x = jnp.full((1, 1, 1, 1), 1 / 3, jnp.float32)
  network = lambda x_in, c_noise: jnp.ones_like(x_in, jnp.bfloat16)
  D = PROCESS.denoise(network, x, jnp.float32([0.5]))
  assert D.dtype == jnp.float32
  # 1/3 / 2 + sqrt(1/8): bfloat16 would be off by 1e-3.
  np.testing.assert_allclose(D.item(), 1 / 6 + 8**-0.5, rtol=ROUNDING)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    D = PROCESS.denoise(
      lambda x_in, _: x_in, jnp.ones((1, 1, 1, 1)), jnp.ones(1)
    )
    assert D.dtype == jnp.float64
    # 0.2 + sqrt(0.2) sqrt(0.8)
    np.testing.assert_allclose(D.item(), 0.6, rtol=1e-15)


def test_noise_levels_follow_their_distribution():
  keys = jax.random.split(jax.random.key(0), 20_000)
  sigma = jax.jit(lambda k: edm.sample_sigma(k, P_mean=-1.2, P_std=1.2))(keys)
  log = np.log(np.asarray(sigma, np.float64))
  assert sigma.dtype == jnp.float32
  # Four standard errors: 1.2 / sqrt(20000) and 1.2 / sqrt(40000).
  assert abs(log.mean() + 1.2) < 4 * 1.2 / 20_000**0.5
  assert abs(log.std() - 1.2) < 4 * 1.2 / 40_000**0.5


def test_noise_level_is_of_its_key_alone_and_log_normal():
  keys = jax.random.split(jax.random.key(1), 4)
  all_four = edm.sample_sigma(keys, P_mean=-1.2, P_std=1.2)
  third = edm.sample_sigma(keys[2:3], P_mean=-1.2, P_std=1.2)
  assert all_four[2] == third[0]
  n = [jax.random.normal(key) for key in keys]
  np.testing.assert_allclose(
    all_four, np.exp(-1.2 + 1.2 * np.float64(n)), rtol=1e-6
  )


def test_loss_sums_over_the_image():
  y = jnp.zeros((2, 3, 5, 2))
  D = jnp.full(y.shape, 0.1).at[1].set(-0.2)
  value = PROCESS.loss(D, y, jnp.float32([0.5, 1.0]))
  # 30 elements: weight 8 x 30 x 0.01, and weight 5 x 30 x 0.04.
  np.testing.assert_allclose(value, [2.4, 6.0], rtol=ROUNDING)
  assert (
    PROCESS.loss(D.astype(jnp.bfloat16), y, jnp.float32([1, 1])).dtype
    == jnp.float32
  )


@pytest.mark.parametrize(
  "seen, factor", [(0, 0), (1e6, 0.1), (5e6, 0.5), (10e6, 1), (200e6, 1)]
)
def test_learning_rate_ramp(seen, factor):
  ramp = jax.jit(lambda n: edm.learning_rate_factor(n, 10_000_000))
  np.testing.assert_allclose(ramp(int(seen)), factor, rtol=1e-7)
  assert edm.learning_rate_factor(int(seen), 0) == 1
