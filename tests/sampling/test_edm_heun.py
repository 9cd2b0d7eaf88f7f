"""EDM's sampler: closed forms, order, churn by hand, and the loop's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import AS_USERS
from diffit_jax import sampling
from diffit_jax.errors import UserError
from diffit_jax.sampling import edm_heun

SHAPE = (3, 2, 2, 2)


def gaussian(mean, std):
  """The exact denoiser of N(mean, std^2) data."""

  def denoiser(x, sigma):
    variance = sigma[:, None, None, None] ** 2
    return (std**2 * x + variance * mean) / (std**2 + variance)

  return denoiser


def noise_of(seed=0, shape=SHAPE):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- noise levels -----------------------------------------------------------


def test_noise_levels():
  # EDM steps in GOLDENS.md
  np.testing.assert_allclose(
    edm_heun.noise_levels(18),
    [
      80,
      57.58598472,
      40.7855738,
      28.3745846,
      19.35245298,
      12.91008238,
      8.400935309,
      5.315194522,
      3.25682152,
      1.923339837,
      1.088170637,
      0.5853481232,
      0.2964422845,
      0.1395164687,
      0.05994731124,
      0.02293451837,
      0.007528019963,
      0.002,
      0,
    ],
    rtol=1e-9,
  )
  levels = edm_heun.noise_levels(40)
  np.testing.assert_allclose(
    levels[:5],
    [80, 69.45094604, 60.11739476, 51.88031814, 44.63020157],
    rtol=1e-9,
  )
  np.testing.assert_allclose(
    levels[-6:],
    [0.01752203651, 0.01081204659, 0.006437113278, 0.003676589168, 0.002, 0],
    rtol=1e-9,
  )


def test_number_of_evaluations():
  assert sampling.make_solver("edm_heun", 18).num_evaluations == 35
  assert sampling.make_solver("edm_heun", 40).num_evaluations == 79
  assert sampling.make_solver("edm_heun", 1).num_evaluations == 1


# --- closed forms -----------------------------------------------------------


@pytest.mark.parametrize(
  "steps, end", [(18, 0.527624637001), (40, 0.504876864654)]
)
def test_toy_value(x64, steps, end):
  # EDM steps in GOLDENS.md: D = 0.25 x / (sigma^2 + 0.25) from z = 1
  x = sampling.sample(
    gaussian(0, 0.5), "edm_heun", jnp.ones((1, 1, 1, 1)), steps=steps
  )
  assert x.dtype == jnp.float64
  np.testing.assert_allclose(x.item(), end, rtol=2e-12)


@pytest.mark.parametrize(
  "steps, end", [(18, 0.527624637001), (40, 0.504876864654)]
)
def test_toy_value_in_float32(steps, end):
  x = jax.jit(
    lambda z: sampling.sample(gaussian(0, 0.5), "edm_heun", z, steps=steps)
  )(jnp.ones((1, 1, 1, 1)))
  assert x.dtype == jnp.float32
  # Some 2n roundings of 6e-8.
  np.testing.assert_allclose(x.item(), end, rtol=2e-6)


def gaussian_end(z, mean, std, high, low):
  """Where the ODE takes x = high z from level high to low.

  dx/dsigma = sigma (x - mean) / (std^2 + sigma^2), so x - mean is proportional
  to sqrt(std^2 + sigma^2).
  """
  ratio = (std**2 + low**2) / (std**2 + high**2)
  return mean + (high * np.asarray(z) - mean) * ratio**0.5


def test_gaussian_data_ends_where_the_ode_does(x64):
  z = noise_of()
  x = sampling.sample(gaussian(0.3, 0.7), "edm_heun", z, steps=400)
  # What is left is the method's own error at 400 steps.
  np.testing.assert_allclose(x, gaussian_end(z, 0.3, 0.7, 80, 0), atol=2e-4)


def test_second_order(x64):
  """Halving the steps' length divides the error by 4.

  The last step, to 0, is Euler's whatever n, so its error must not count:
  sigma_min is so small that it is far below the others'.
  """
  z = noise_of()
  options = dict(sigma_min=1e-7, sigma_max=5.0, rho=3.0)
  end = gaussian_end(z, 0.3, 0.7, 5.0, 0)
  errors = [
    np.abs(
      sampling.sample(gaussian(0.3, 0.7), "edm_heun", z, steps=n, **options)
      - end
    ).max()
    for n in (41, 81, 161, 321)
  ]
  ratios = np.divide(errors[:-1], errors[1:])
  np.testing.assert_allclose(ratios, 4, rtol=0.1)
  np.testing.assert_allclose(ratios[-1], 4, rtol=0.02)


def test_one_step_is_euler_from_sigma_max_to_the_denoised_image():
  z = noise_of().astype(jnp.float32)
  denoiser = gaussian(0.3, 0.7)
  x = sampling.sample(denoiser, "edm_heun", z, steps=1)
  np.testing.assert_allclose(
    x,
    denoiser(80 * z, jnp.full(3, 80.0)),
    atol=2e-5,  # rounding of 80 z
  )


# --- churn ------------------------------------------------------------------

CHURN = dict(S_churn=9.0, S_min=0.05, S_max=50.0, S_noise=1.007)


def algorithm_2(D, z, step_noise, n, S_churn, S_min, S_max, S_noise):
  """Karras et al., Algorithm 2, line by line in numpy float64."""
  i = np.arange(n)
  t = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  t = np.append(t, 0)
  x = z * t[0]
  for i in range(n):
    gamma = 0
    if S_min <= t[i] <= S_max:
      gamma = min(S_churn / n, np.sqrt(2) - 1)
    t_hat = t[i] + gamma * t[i]
    x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * S_noise * step_noise[i]
    d = (x_hat - D(x_hat, t_hat)) / t_hat
    x = x_hat + (t[i + 1] - t_hat) * d
    if t[i + 1] != 0:
      d_prime = (x - D(x, t[i + 1])) / t[i + 1]
      x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
  return x


def curved(x, sigma):
  """A denoiser that is no line, so that every mistake shows."""
  numpy = np if isinstance(x, np.ndarray) else jnp
  return numpy.sin(x) / (1 + sigma**2) + 0.1 * x / (0.25 + sigma)


@pytest.mark.parametrize("S_churn", [0.0, 9.0, 40.0])  # 40: gamma is capped
def test_churn_with_given_noise_is_algorithm_2(x64, S_churn):
  n = 12
  z, step_noise = noise_of(0), noise_of(1, (n, *SHAPE))
  options = {**CHURN, "S_churn": S_churn}
  x = jax.jit(
    lambda z, e: sampling.sample(
      lambda x, sigma: curved(x, sigma[:, None, None, None]),
      "edm_heun",
      z,
      steps=n,
      step_noise=e,
      **options,
    )
  )(z, step_noise)
  expected = algorithm_2(
    curved, np.asarray(z), np.asarray(step_noise), n, **options
  )
  np.testing.assert_allclose(x, expected, rtol=1e-11)


@pytest.fixture()
def optimised():
  """The compiler as users have it, for sums in their usual order."""
  option = "jax_disable_most_optimizations"
  before = jax.config.read(option)
  jax.config.update(option, False)
  yield
  jax.config.update(option, before)


def test_keys_are_folded_with_the_number_of_the_draw(optimised):
  n = 5
  z = noise_of().astype(jnp.float32)
  keys = jax.random.split(jax.random.key(2), 3)
  drawn = jnp.stack(
    [
      jnp.stack(
        [
          jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:])
          for key in keys
        ]
      )
      for i in range(n)
    ]
  )
  run = lambda **kw: sampling.sample(
    gaussian(0.3, 0.7), "edm_heun", z, steps=n, **CHURN, **kw
  )
  # Rounding of states of size 80, compiled in two ways.
  np.testing.assert_allclose(run(keys=keys), run(step_noise=drawn), atol=1e-5)


def test_sample_does_not_depend_on_its_batch():
  n = 6
  z = noise_of(3, (5, 4, 4, 1)).astype(jnp.float32)
  keys = jax.random.split(jax.random.key(4), 5)
  run = jax.jit(
    lambda z, keys: sampling.sample(
      gaussian(0.3, 0.7), "edm_heun", z, steps=n, keys=keys, **CHURN
    ),
    compiler_options=AS_USERS,
  )
  together = run(z, keys)
  apart = jnp.concatenate([run(z[:1], keys[:1]), run(z[1:], keys[1:])])
  # Rounding: shapes may be vectorised differently.
  np.testing.assert_allclose(together, apart, atol=1e-6)
  other = run(z, keys[::-1])
  assert np.abs(other[0] - together[0]).max() > 0.01


def test_churn_keeps_the_distribution():
  """Gaussian data comes out with its own mean and std, noise added or not."""
  z = noise_of(5, (2000, 2, 2, 1)).astype(jnp.float32)
  keys = jax.random.split(jax.random.key(6), 2000)
  x = jax.jit(
    lambda z, keys: sampling.sample(
      gaussian(0.3, 0.7), "edm_heun", z, steps=40, keys=keys, S_churn=20.0
    )
  )(z, keys)
  # Four standard errors of 8000 draws, plus 0.5 % for the 40 steps.
  assert abs(x.mean() - 0.3) < 4 * 0.7 / 8000**0.5
  assert abs(x.std() / 0.7 - 1) < 4 / 16000**0.5 + 0.005


# --- the loop ---------------------------------------------------------------


@pytest.mark.parametrize("churn", [{}, CHURN])
def test_network_is_traced_once(churn):
  traces = []

  def denoiser(x, sigma):
    traces.append((x.shape, sigma.shape, x.dtype, sigma.dtype))
    return gaussian(0.3, 0.7)(x, sigma)

  run = jax.jit(
    lambda z, keys: sampling.sample(
      denoiser, "edm_heun", z, steps=18, keys=keys, **churn
    )
  )
  for seed in range(2):
    run(
      noise_of(seed).astype(jnp.float32),
      jax.random.split(jax.random.key(seed), 3),
    )
  assert traces == [(SHAPE, (3,), jnp.float32, jnp.float32)]


def test_deterministic_run_draws_nothing():
  def trace(**options):
    return jax.make_jaxpr(
      lambda z, keys: sampling.sample(
        gaussian(0, 1), "edm_heun", z, steps=4, keys=keys, **options
      )
    )(jnp.zeros(SHAPE), jax.random.split(jax.random.key(0), 3))

  assert "random_bits" in str(trace(S_churn=1.0))
  assert "random" not in str(trace())
  # Churn that reaches no noise level is none.
  assert "random" not in str(trace(S_churn=1.0, S_min=100.0))


def test_network_in_bfloat16_leaves_the_state_in_float32():
  x = sampling.sample(
    lambda x, sigma: gaussian(0, 0.5)(x, sigma).astype(jnp.bfloat16),
    "edm_heun",
    jnp.ones((1, 1, 1, 1)),
    steps=18,
  )
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(x.item(), 0.5276, rtol=0.02)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(solver="rk4"), "'rk4' is unknown; allowed: edm_heun"),
    (dict(steps=0), "steps=0 must be a whole number above 0"),
    (dict(steps=2.5), "steps=2.5 must be"),
    (dict(steps=True), "steps=True must be"),
    (dict(eta=1.0), "no option 'eta'; allowed: sigma_min, sigma_max, rho"),
    (dict(sigma_min=0.0), "sigma_min=0.0 < sigma_max=80.0"),
    (dict(sigma_max=0.001), "sigma_min=0.002 < sigma_max=0.001"),
    (dict(S_churn=-1.0), "S_churn=-1.0 >= 0"),
    (dict(S_churn=1.0), r"give keys, .* or step_noise \[4, b, h, w, c\]"),
    (
      dict(S_churn=1.0, keys=jax.random.split(jax.random.key(0), 2)),
      r"keys must be \[3\] typed",
    ),
    (
      dict(S_churn=1.0, keys=jnp.zeros((3, 2), jnp.uint32)),
      r"keys must be .* not uint32 \(3, 2\)",
    ),
    (
      dict(S_churn=1.0, step_noise=jnp.zeros((7, *SHAPE))),
      r"\(7, 3, 2, 2, 2\); this run draws \(4, 3, 2, 2, 2\)",
    ),
    (dict(noise=jnp.zeros((3, 2))), r"noise must be .* \(3, 2\)"),
  ],
)
def test_mistakes(kwargs, message):
  call = dict(solver="edm_heun", noise=jnp.zeros(SHAPE), steps=4)
  with pytest.raises(UserError, match=message):
    sampling.sample(gaussian(0, 1), **{**call, **kwargs})
