"""EDM's coefficients, noise and loss against identities and goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import edm
from diffit_jax.errors import UserError

SIGMA_DATA = 0.5
CONFIG = {"sigma_data": SIGMA_DATA, "P_mean": -1.2, "P_std": 1.2}
PROCESS = edm.make(CONFIG)
SIGMAS = np.float32([0.002, 0.02, 0.1, 0.5, 1.0, 7.0, 80.0])
# A handful of float32 roundings (6e-8 each) of numbers of order one.
ROUNDING = 5e-7


def test_output_scale_times_weight_is_one():
  _, c_out, _, _ = PROCESS.coefficients(SIGMAS)
  weight = PROCESS.loss_weight(SIGMAS)
  np.testing.assert_allclose(c_out**2 * weight, 1, rtol=ROUNDING)


def test_network_sees_and_answers_unit_variance():
  c_skip, c_out, c_in, _ = PROCESS.coefficients(SIGMAS)
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
    *PROCESS.coefficients(jnp.float32(sigma)),
    PROCESS.loss_weight(jnp.float32(sigma)),
  )
  assert all(c.dtype == jnp.float32 for c in coefficients)
  np.testing.assert_allclose(
    [*coefficients, weight], expected, rtol=ROUNDING, atol=1e-9
  )


def test_coefficients_are_float32_for_bfloat16_noise_levels():
  assert PROCESS.coefficients(jnp.bfloat16(1))[0].dtype == jnp.float32


def test_denoiser_of_gaussian_data():
  # For y ~ N(0, s^2), E[y | x] = s^2 x / (s^2 + sigma^2), which is c_skip x if
  # s = sigma_data: the best F is 0. For any s the best F is linear in c_in x.
  s, sigma = 0.8, jnp.float32([0.05, 1.3])
  x = jnp.sin(jnp.arange(2 * 3 * 4 * 2.0)).reshape(2, 3, 4, 2)
  exact = s**2 * x / (s**2 + sigma**2)[:, None, None, None]
  c_skip, c_out, c_in, _ = PROCESS.coefficients(sigma)
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
  sigma = jax.jit(PROCESS.sample_level)(keys)
  log = np.log(np.asarray(sigma, np.float64))
  assert sigma.dtype == jnp.float32
  # Four standard errors: 1.2 / sqrt(20000) and 1.2 / sqrt(40000).
  assert abs(log.mean() + 1.2) < 4 * 1.2 / 20_000**0.5
  assert abs(log.std() - 1.2) < 4 * 1.2 / 40_000**0.5


def test_noise_level_is_of_its_key_alone_and_log_normal():
  keys = jax.random.split(jax.random.key(1), 4)
  all_four = PROCESS.sample_level(keys)
  third = PROCESS.sample_level(keys[2:3])
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


# --- VP and VE, and what is true of all three --------------------------------


def make(kind):
  return edm.make(CONFIG | {"precond": kind})


def test_vp_golden():
  with jax.enable_x64(True):
    t = jnp.array([1.0, 0.5, 1e-3, 1e-5])
    expected = [152.1669702839, 3.412918309, 0.01048599279, 0.001000497627]
    np.testing.assert_allclose(edm.vp_sigma(t), expected, rtol=1e-9)
    np.testing.assert_allclose(edm.vp_time(edm.vp_sigma(t)), t)
    c_skip, c_out, c_in, c_noise = make("vp").coefficients(jnp.float64(1))
    np.testing.assert_allclose(c_noise, 258.7013021704, rtol=1e-12)
    np.testing.assert_allclose((c_skip, c_out, c_in**2), (1, -1, 0.5))


def test_ve_golden():
  c_skip, c_out, c_in, c_noise = make("ve").coefficients(jnp.float32(1))
  np.testing.assert_allclose(c_noise, -0.6931471806, rtol=1e-6)
  assert (c_skip, c_out, c_in) == (1, 1, 1)


@pytest.mark.parametrize("kind", edm.PRECONDS)
def test_the_weight_makes_the_networks_error_count_alike(kind):
  """c_out^2 times the weight is 1 at every level."""
  process, sigma = make(kind), jnp.geomspace(0.002, 80, 50)
  c_out = process.coefficients(sigma)[1]
  np.testing.assert_allclose(c_out**2 * process.loss_weight(sigma), 1, 1e-5)


@pytest.mark.parametrize("kind", edm.PRECONDS)
def test_the_perfect_network_has_no_loss(kind):
  """F = (y - c_skip x) / c_out makes D = y."""
  process = make(kind)
  y = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))
  sigma = jnp.geomspace(0.05, 20, 5)
  x = y + sigma[:, None, None, None]
  c_skip, c_out, c_in, c_noise = (
    c[:, None, None, None] for c in process.coefficients(sigma)
  )

  def network(scaled, level):
    np.testing.assert_allclose(scaled, c_in * x, rtol=1e-6)
    np.testing.assert_array_equal(level, c_noise[:, 0, 0, 0])
    return (y - c_skip * x) / c_out

  D = process.denoise(network, x, sigma)
  np.testing.assert_allclose(D, y, atol=2e-5)
  assert process.loss(D, y, sigma).max() < 1e-6
  off = process.loss(y + 0.1, y, sigma)
  want = process.loss_weight(sigma) * 0.01 * 48
  np.testing.assert_allclose(off, want, rtol=1e-4)


def test_noise_levels_of_training():
  keys = jax.random.split(jax.random.key(1), 20_000)
  ve = np.log(make("ve").sample_level(keys))
  assert np.log(0.02) <= ve.min() and ve.max() <= np.log(100)
  np.testing.assert_allclose(
    np.quantile(ve, [0.25, 0.5, 0.75]),
    np.log(0.02) + np.log(5000) * np.array([0.25, 0.5, 0.75]),
    atol=0.1,  # 4 standard errors
  )
  t = edm.vp_time(make("vp").sample_level(keys))
  np.testing.assert_allclose(
    np.quantile(t, [0, 0.25, 0.5, 0.75, 1]),
    [0, 0.25, 0.5, 0.75, 1],
    atol=0.015,
  )


def test_edm_is_the_default_and_others_are_refused():
  sigma = jnp.array([0.1, 3.0])
  for default, named in zip(
    PROCESS.coefficients(sigma), make("edm").coefficients(sigma)
  ):
    np.testing.assert_array_equal(default, named)
  with pytest.raises(UserError, match="diffusion.precond='ddpm': use one of"):
    make("ddpm")
