"""VP and VE: golden values, and the identities of every preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import edm, precond
from diffit_jax.errors import UserError

EDM = {"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2}


def make(kind):
  return precond.make(EDM | {"precond": kind})


def test_vp_golden():
  with jax.enable_x64(True):
    t = jnp.array([1.0, 0.5, 1e-3, 1e-5])
    expected = [152.1669702839, 3.412918309, 0.01048599279, 0.001000497627]
    np.testing.assert_allclose(precond.vp_sigma(t), expected, rtol=1e-9)
    np.testing.assert_allclose(precond.vp_time(precond.vp_sigma(t)), t)
    c_skip, c_out, c_in, c_noise = make("vp").coefficients(jnp.float64(1))
    np.testing.assert_allclose(c_noise, 258.7013021704, rtol=1e-12)
    np.testing.assert_allclose((c_skip, c_out, c_in**2), (1, -1, 0.5))


def test_ve_golden():
  c_skip, c_out, c_in, c_noise = make("ve").coefficients(jnp.float32(1))
  np.testing.assert_allclose(c_noise, -0.6931471806, rtol=1e-6)
  assert (c_skip, c_out, c_in) == (1, 1, 1)


@pytest.mark.parametrize("kind", precond.KINDS)
def test_the_weight_makes_the_networks_error_count_alike(kind):
  """c_out^2 times the weight is 1 at every level."""
  process, sigma = make(kind), jnp.geomspace(0.002, 80, 50)
  c_out = process.coefficients(sigma)[1]
  np.testing.assert_allclose(c_out**2 * process.loss_weight(sigma), 1, 1e-5)


@pytest.mark.parametrize("kind", precond.KINDS)
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
  ve = np.log(make("ve").sample_sigma(keys))
  assert np.log(0.02) <= ve.min() and ve.max() <= np.log(100)
  np.testing.assert_allclose(
    np.quantile(ve, [0.25, 0.5, 0.75]),
    np.log(0.02) + np.log(5000) * np.array([0.25, 0.5, 0.75]),
    atol=0.1,  # 4 standard errors
  )
  t = precond.vp_time(make("vp").sample_sigma(keys))
  np.testing.assert_allclose(
    np.quantile(t, [0, 0.25, 0.5, 0.75, 1]),
    [0, 0.25, 0.5, 0.75, 1],
    atol=0.015,
  )


def test_edm_is_the_default_and_others_are_refused():
  sigma = jnp.array([0.1, 3.0])
  for ours, theirs in zip(
    precond.make(EDM).coefficients(sigma), edm.precondition(sigma, 0.5)
  ):
    np.testing.assert_array_equal(ours, theirs)
  with pytest.raises(UserError, match="diffusion.precond='ddpm': use one of"):
    make("ddpm")
