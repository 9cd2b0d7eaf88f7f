"""DPM-Solver++(2M): Algorithm 2 in numpy, order two, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.diffusion import adm
import vp_problems as vp


def lu(network, z, kept):
  """Lu et al. 2022, Algorithm 2, and a last step to x_0; float64."""
  abar = vp.ABAR[kept]
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  lam = np.log(alpha / sigma)

  def predict(x, i):
    eps = network(x, kept[i])[..., : x.shape[-1]]
    return (x - sigma[i] * eps) / alpha[i]

  x, Q = z, []
  for i in range(1, len(kept)):
    Q.append(predict(x, i - 1))
    h = lam[i] - lam[i - 1]
    D = Q[-1]
    if i > 1:
      r = (lam[i - 1] - lam[i - 2]) / h
      D = (1 + 1 / (2 * r)) * Q[-1] - 1 / (2 * r) * Q[-2]
    x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * D
  return predict(x, len(kept) - 1)


@pytest.mark.parametrize("spacing", ["logsnr", "uniform", "trailing"])
@pytest.mark.parametrize("n", [1, 2, 3, 15])
def test_algorithm(x64, spacing, n):
  z = vp.noise_of()
  x = jax.jit(
    lambda z: sampling.sample(
      vp.curved, "dpmpp_2m", z, steps=n, spacing=spacing
    )
  )(z)
  kept = adm.make_schedule(1000, f"{spacing}{n}".replace("uniform", ""))
  expected = lu(lambda x, t: vp.curved(x, t, np), z, kept.timesteps[::-1])
  np.testing.assert_allclose(x, expected, rtol=1e-9)


def test_two_steps_are_ddim(x64):
  # The first and the last step are of first order, which is DDIM's.
  run = lambda solver: sampling.sample(
    vp.curved, solver, vp.noise_of(), steps=2, spacing="uniform"
  )
  np.testing.assert_allclose(run("dpmpp_2m"), run("ddim"), rtol=1e-9)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_data_of_one_point_is_found_in_any_number_of_steps(x64, solver):
  z = vp.noise_of()
  for n in (1, 9):
    x = sampling.sample(
      vp.denoiser_of(vp.normal(0.3, 1e-12)), solver, z, steps=n
    )
    np.testing.assert_allclose(x, 0.3, rtol=1e-9)


def test_second_order(x64):
  """Halving the steps' length divides the error by 4; see test_ddim."""
  z = vp.noise_of()
  run = lambda n: sampling.sample(
      vp.denoiser_of(vp.TWO_NORMALS), "dpmpp_2m", z, steps=n,
      spacing="logsnr_exact",
  )  # fmt: skip
  end = vp.trajectory_end()
  orders = vp.measured_orders(run, end, (41, 81, 161, 321))
  np.testing.assert_allclose(orders, 2, atol=0.1)
  np.testing.assert_allclose(orders[-1], 2, atol=0.02)


def test_default_spacing_is_of_second_order_while_its_steps_are_free(x64):
  """Rounded to whole steps; beyond 100 those next to t = 0 are all taken."""
  z = vp.noise_of()
  run = lambda n: sampling.sample(
    vp.denoiser_of(vp.TWO_NORMALS), "dpmpp_2m", z, steps=n
  )
  end = vp.trajectory_end()
  orders = vp.measured_orders(run, end, (21, 41, 81))
  np.testing.assert_allclose(orders, 2, atol=0.15)


@pytest.mark.slow
def test_default_spacing_beats_even_steps_and_ddim(x64):
  """The measurement behind the CHOICE in the module."""
  z = vp.noise_of(0, (1, 8, 8, 4))
  end = vp.trajectory_end(z.shape)

  def error(solver, **options):
    x = sampling.sample(vp.denoiser_of(vp.TWO_NORMALS), solver, z, **options)
    return np.sqrt(np.mean((x - end) ** 2))

  for n in (10, 20):
    best = error("dpmpp_2m", steps=n)
    assert best < error("dpmpp_2m", steps=n, spacing="trailing") / 1.5
    assert best < error("dpmpp_2m", steps=n, spacing="uniform") / 7
    assert best < error("ddim", steps=n) / 3


def test_float32_follows_float64():
  z = vp.noise_of()
  run = lambda: sampling.sample(
    vp.denoiser_of(vp.TWO_NORMALS), "dpmpp_2m", z, steps=50
  )
  x = run()
  with jax.enable_x64(True):
    expected = run()
  assert x.dtype == jnp.float32 and expected.dtype == jnp.float64
  np.testing.assert_allclose(x, expected, atol=1e-5)


@pytest.mark.parametrize(
  "spacing, dtype", [("logsnr", jnp.int32), ("logsnr_exact", jnp.float32)]
)
def test_traced_once(spacing, dtype):
  run = lambda denoiser: sampling.sample(
    denoiser, "dpmpp_2m", jnp.zeros(vp.SHAPE), steps=20, spacing=spacing
  )
  assert vp.traced_calls(run) == [(vp.SHAPE, jnp.float32, (3,), dtype)]
  assert sampling.make_solver("dpmpp_2m", 20).num_evaluations == 20
