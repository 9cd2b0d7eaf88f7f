"""Ancestral sampling: goldens, the loop in numpy, Gaussian data, keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.diffusion import adm
from diffit_jax.errors import UserError
from diffit_jax.sampling import ddpm
import vp_problems as vp


@pytest.mark.parametrize(  # ADM steps, GOLDENS.md: x = 0.5, eps = 0.3, v = -0.2
  "k, t, mean, log_variance",
  [
    (249, 999, 0.49637094, -2.55723),
    (125, 502, 0.49701828, -3.01244688),
    (1, 4, 0.49335015, -8.58683205),
    (0, 0, 0.49702483, None),
  ],
)
def test_golden_step(k, t, mean, log_variance):
  solver = ddpm.make_solver(250)
  row = {
    name: jnp.asarray(table[249 - k], jnp.float32)
    for name, table in solver.rows.items()
  }
  assert row["t"] == t
  x = jnp.full((1, 1, 1, 1), 0.5)
  out = jnp.array([0.3, -0.2]).reshape(1, 1, 1, 2)
  step = lambda z: solver.update(x, row, out, jnp.full_like(x, z)).item()
  np.testing.assert_allclose(step(0.0), mean, rtol=2e-7)
  if log_variance is None:
    assert step(1e6) == step(0.0)
  else:
    # Through exp and a difference of numbers of order one.
    sigma = (step(1e3) - step(0.0)) / 1e3
    np.testing.assert_allclose(2 * np.log(sigma), log_variance, atol=2e-5)


def ancestral(network, z, step_noise, betas, timesteps, variance, clip=False):
  """Facts 4.1, 4.2 and 4.5 in float64, one step after the other."""
  abar = np.cumprod(1 - betas)
  abar_prev = np.append(1, abar[:-1])
  posterior = betas * (1 - abar_prev) / (1 - abar)
  log_posterior = np.log(np.append(posterior[1], posterior[1:]))
  x = z
  for draw, k in enumerate(reversed(range(len(betas)))):
    eps, v = np.split(network(x, timesteps[k]), 2, axis=-1)
    x0 = np.sqrt(1 / abar[k]) * x - np.sqrt(1 / abar[k] - 1) * eps
    x0 = np.clip(x0, -1, 1) if clip else x0
    mean = (
      betas[k] * np.sqrt(abar_prev[k]) / (1 - abar[k]) * x0
      + (1 - abar_prev[k]) * np.sqrt(1 - betas[k]) / (1 - abar[k]) * x
    )
    f = {"learned": (v + 1) / 2, "fixed_small": 0, "fixed_large": 1}[variance]
    log_variance = f * np.log(betas[k]) + (1 - f) * log_posterior[k]
    x = mean + (k != 0) * np.exp(log_variance / 2) * step_noise[draw]
  return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["learned", "fixed_small", "fixed_large"])
def test_given_noise_is_the_algorithm(x64, variance, clip):
  n = 20
  z, step_noise = vp.noise_of(0), vp.noise_of(1, (n, *vp.SHAPE))
  kept = np.rint(np.arange(n) * 999 / (n - 1)).astype(int)
  betas = 1 - vp.ABAR[kept] / np.append(1, vp.ABAR[kept[:-1]])
  options = dict(clip_denoised=clip)
  channels = 2 * z.shape[-1]
  if variance != "learned":
    options["variance"] = variance
    channels = z.shape[-1]
  x = jax.jit(
      lambda z, e: sampling.sample(
          lambda x, t: vp.curved(x, t)[..., :channels],
          "ddpm", z, steps=n, step_noise=e, **options,
      )
  )(z, step_noise)  # fmt: skip
  expected = ancestral(
      lambda x, t: vp.curved(x, t, np), z, step_noise, betas, kept,
      variance, clip,
  )  # fmt: skip
  # 1 - abar / abar' keeps 12 digits of the betas.
  np.testing.assert_allclose(x, expected, rtol=1e-9)


def test_last_draw_is_made_and_not_used():
  n = 5
  z, e = vp.noise_of(0), jnp.asarray(vp.noise_of(1, (n, *vp.SHAPE)))
  run = lambda e: sampling.sample(vp.curved, "ddpm", z, steps=n, step_noise=e)
  np.testing.assert_array_equal(run(e), run(e.at[-1].set(1e9)))
  assert np.abs(run(e) - run(e.at[-2].set(0))).max() > 1e-4
  with pytest.raises(UserError, match=r"this run draws \(5, 3, 2, 2, 2\)"):
    run(e[1:])


def test_network_sees_the_original_steps_and_is_traced_once():
  seen = []

  def denoiser(x, t):
    jax.debug.callback(lambda t: seen.append(np.array(t)), t, ordered=True)
    return vp.curved(x, t)

  z = vp.noise_of().astype(jnp.float32)
  keys = jax.random.split(jax.random.key(0), 3)
  run = lambda denoiser: sampling.sample(
    denoiser, "ddpm", z, steps=250, keys=keys
  )
  jax.block_until_ready(run(denoiser))
  jax.effects_barrier()
  expected = adm.make_schedule(1000, 250).timesteps[::-1]
  np.testing.assert_array_equal(np.stack(seen), np.stack([expected] * 3, 1))
  np.testing.assert_array_equal(
    sampling.make_solver("ddpm", 250).levels, expected
  )
  assert sampling.make_solver("ddpm", 250).num_evaluations == 250
  assert vp.traced_calls(run) == [(vp.SHAPE, jnp.float32, (3,), jnp.int32)]


def gaussian_moments(mean, std, n, variance):
  """Where n steps take N(0, 1), for data N(mean, std^2): each is linear."""
  s = adm.make_schedule(1000, n)
  added = s.posterior_variance if variance == "fixed_small" else s.betas
  m, v = 0.0, 1.0
  for k in reversed(range(n)):
    abar = s.alphas_cumprod[k]
    total = abar * std**2 + 1 - abar
    # x_0 = offset + slope x, the mean of clean data given x.
    slope = np.sqrt(abar) * std**2 / total
    offset = mean * (1 - abar) / total
    m = s.c1[k] * (offset + slope * m) + s.c2[k] * m
    v = v * (s.c1[k] * slope + s.c2[k]) ** 2 + (k > 0) * added[k]
  return m, v**0.5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_gaussian_data(variance):
  mean, std = 0.3, 0.7
  # The whole chain ends at the data, a short one known to be a little off.
  np.testing.assert_allclose(
    gaussian_moments(mean, std, 1000, variance), (mean, std), rtol=0.01
  )
  n = 50
  m, s = gaussian_moments(mean, std, n, variance)
  assert 0.01 < abs(s / std - 1) < 0.1
  z = vp.noise_of(5, (4000, 2, 2, 1))
  keys = jax.random.split(jax.random.key(6), 4000)
  x = jax.jit(
      lambda z, keys: sampling.sample(
          vp.denoiser_of(vp.normal(mean, std)), "ddpm", z, steps=n, keys=keys,
          variance=variance,
      )
  )(z, keys)  # fmt: skip
  # Four standard errors of 16000 draws.
  assert abs(x.mean() - m) < 4 * s / 16_000**0.5
  assert abs(x.std() / s - 1) < 4 / 32_000**0.5


def test_sample_does_not_depend_on_its_batch():
  z = vp.noise_of(3, (5, 4, 4, 1)).astype(jnp.float32)
  keys = jax.random.split(jax.random.key(4), 5)
  run = jax.jit(
    lambda z, keys: sampling.sample(vp.curved, "ddpm", z, steps=6, keys=keys)
  )
  together = run(z, keys)
  apart = run(z[1:], keys[1:])
  # Rounding: shapes may be vectorised differently, and x_0 from t = 999 has
  # numbers of some 150.
  np.testing.assert_allclose(together[1:], apart, atol=1e-4)
  assert np.abs(run(z, keys[::-1])[0] - together[0]).max() > 0.01


def test_float32_follows_float64():
  n = 250
  z, e = vp.noise_of(0), vp.noise_of(1, (n, *vp.SHAPE))
  run = lambda: sampling.sample(
    vp.denoiser_of(vp.TWO_NORMALS), "ddpm", z, steps=n, step_noise=e
  )
  x = run()
  with jax.enable_x64(True):
    expected = run()
  assert x.dtype == jnp.float32 and expected.dtype == jnp.float64
  # 250 steps with roundings of 6e-8 times coefficients of up to 160.
  np.testing.assert_allclose(x, expected, atol=2e-5)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(steps=1001), "steps=1001 must be from 1 to 1000"),
    (dict(spacing="even"), "spacing='even' is unknown; allowed: uniform"),
    (dict(spacing="ddim", steps=300), "nearest are 'ddim250'"),
    (dict(variance="learned"), "'learned' is unknown; .*: fixed_small"),
    (dict(eta=1.0), "'ddpm' has no option 'eta'"),
    (dict(keys=None), r"give keys, .* or step_noise \[4, b, h, w, c\]"),
    (
      dict(denoiser=lambda x, t: x[..., :1]),
      "1 channels for data with 2: it must be 2",
    ),
  ],
)
def test_mistakes(kwargs, message):
  call = dict(
    denoiser=vp.curved,
    solver="ddpm",
    noise=jnp.zeros(vp.SHAPE),
    steps=4,
    keys=jax.random.split(jax.random.key(0), 3),
  )
  with pytest.raises(UserError, match=message):
    sampling.sample(**{**call, **kwargs})
