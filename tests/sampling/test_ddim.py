"""DDIM: goldens, its ancestral limit, the loop in numpy, order one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.errors import UserError
from diffit_jax.sampling import ddim
import vp_problems as vp


@pytest.mark.parametrize(  # ADM steps in GOLDENS.md: x = 0.5, eps = 0.3
  "k, expected",
  # At k = 1 the golden is 0.49521607, from 1 - abar in float32; this is (1)-(3)
  # with numpy's float64 on their tables.
  [(249, 0.50823361), (125, 0.50480080), (1, 0.49521584), (0, 0.49702483)],
)
def test_golden_step(k, expected):
  solver = ddim.make_solver(250)
  row = {
    name: jnp.asarray(table[249 - k], jnp.float32)
    for name, table in solver.rows.items()
  }
  x = jnp.full((1, 1, 1, 1), 0.5)
  x = solver.update(x, row, jnp.full_like(x, 0.3), None)
  np.testing.assert_allclose(x.item(), expected, rtol=2e-7)


@pytest.mark.parametrize("spacing, n", [("uniform", 40), ("ddim", 25)])
def test_eta_one_is_the_ancestral_step_with_the_small_variance(x64, spacing, n):
  """ "fixed_small", the posterior's; v is not used, nor is z at the last."""
  z, e = vp.noise_of(0), vp.noise_of(1, (n, *vp.SHAPE))
  run = lambda solver, **options: sampling.sample(
      lambda x, t: vp.curved(x, t)[..., :2],
      solver, z, steps=n, step_noise=e, spacing=spacing, **options,
  )  # fmt: skip
  np.testing.assert_allclose(
    run("ddim", eta=1.0), run("ddpm", variance="fixed_small"), rtol=1e-9
  )


def song(network, z, step_noise, kept, eta, clip):
  """Facts 4.5 in float64; eps is taken again from x_0, clipped or not."""
  x = z
  for draw, k in enumerate(reversed(range(len(kept)))):
    abar = vp.ABAR[kept[k]]
    abar_prev = vp.ABAR[kept[k - 1]] if k else 1.0
    eps = network(x, kept[k])[..., : x.shape[-1]]
    x0 = x / np.sqrt(abar) - np.sqrt(1 / abar - 1) * eps
    x0 = np.clip(x0, -1, 1) if clip else x0
    eps = (x / np.sqrt(abar) - x0) / np.sqrt(1 / abar - 1)
    sigma = (
      eta
      * np.sqrt((1 - abar_prev) / (1 - abar))
      * np.sqrt(1 - abar / abar_prev)
    )
    x = (
      np.sqrt(abar_prev) * x0
      + np.sqrt(1 - abar_prev - sigma**2) * eps
      + (k != 0) * sigma * step_noise[draw]
    )
  return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_given_noise_is_the_algorithm(x64, eta, clip):
  n = 20
  z, e = vp.noise_of(0), vp.noise_of(1, (n, *vp.SHAPE))
  kept = np.rint(np.arange(n) * 999 / (n - 1)).astype(int)
  x = jax.jit(
      lambda z, e: sampling.sample(
          vp.curved, "ddim", z, steps=n, step_noise=e, eta=eta,
          clip_denoised=clip,
      )
  )(z, e)  # fmt: skip
  network = lambda x, t: vp.curved(x, t, np)
  expected = song(network, z, e, kept, eta, clip)
  np.testing.assert_allclose(x, expected, rtol=1e-9)


def test_largest_eta():
  """Where 1 - abar_prev = sigma^2, the direction to x_t gets no weight."""
  kept = np.rint(np.arange(10) * 111).astype(int)
  abar = vp.ABAR[kept]
  largest = np.sqrt((1 - abar[1:]) / (1 - abar[1:] / abar[:-1])).min()
  assert 1 < largest < 1.01
  ddim.make_solver(10, eta=largest - 1e-9)
  with pytest.raises(UserError, match=f"from 0 to {largest:.4g} at 10 steps"):
    ddim.make_solver(10, eta=largest + 1e-3)
  with pytest.raises(UserError, match="eta=-0.1 must be from 0"):
    ddim.make_solver(10, eta=-0.1)
  assert ddim.make_solver(1000, eta=1.3).num_draws == 1000


def test_eta_zero_draws_nothing():
  def trace(eta):
    return str(
      jax.make_jaxpr(
        lambda z, keys: sampling.sample(
          vp.curved, "ddim", z, steps=4, keys=keys, eta=eta
        )
      )(jnp.zeros(vp.SHAPE), jax.random.split(jax.random.key(0), 3))
    )

  assert "random_bits" in trace(0.5) and "random" not in trace(0.0)
  run = lambda: sampling.sample(vp.curved, "ddim", vp.noise_of(), steps=4)
  np.testing.assert_array_equal(run(), run())


def test_first_order(x64):
  """Halving the steps' length halves the error.

  Steps evenly in lambda, fractions of t, so that each run's levels are half of
  the next one's. The reference goes to t = 0 and takes x_0 there, as the last
  step of every run does.
  """
  z = vp.noise_of()
  run = lambda n: sampling.sample(
      vp.denoiser_of(vp.TWO_NORMALS), "ddim", z, steps=n,
      spacing="logsnr_exact",
  )  # fmt: skip
  end = vp.trajectory_end()
  orders = vp.measured_orders(run, end, (41, 81, 161, 321))
  np.testing.assert_allclose(orders, 1, atol=0.1)
  np.testing.assert_allclose(orders[-1], 1, atol=0.02)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "logsnr", "karras"])
def test_gaussian_data_ends_where_the_trajectory_does(x64, spacing):
  z, (mean, std) = vp.noise_of(), (0.3, 0.7)
  x = sampling.sample(
      vp.denoiser_of(vp.normal(mean, std)), "ddim", z, steps=500,
      spacing=spacing,
  )  # fmt: skip
  # x_t - sqrt(abar) mean is proportional to the std of x_t.
  abar = vp.ABAR[999]
  end = mean + (z - abar**0.5 * mean) * std / (abar * std**2 + 1 - abar) ** 0.5
  # The error of first order at 500 steps.
  np.testing.assert_allclose(x, end, atol=0.02)


def test_sample_does_not_depend_on_its_batch():
  z = vp.noise_of(3, (5, 4, 4, 1)).astype(jnp.float32)
  keys = jax.random.split(jax.random.key(4), 5)
  run = jax.jit(
    lambda z, keys: sampling.sample(
      vp.curved, "ddim", z, steps=6, keys=keys, eta=0.7
    )
  )
  together = run(z, keys)
  apart = run(z[1:], keys[1:])
  # Rounding: shapes may be vectorised differently, and x_0 from t = 999 has
  # numbers of some 150.
  np.testing.assert_allclose(together[1:], apart, atol=1e-4)
