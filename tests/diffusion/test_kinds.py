"""The table of diffusions: what every row has, and that a row is enough."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_latent
from diffit_jax import sampling
from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.sampling import ddim, edm_heun, euler
from diffit_jax.training import objective

CONFIGS = {
  "edm": (digits, "debug"),
  "adm": (digits_latent, "debug"),
  "flow": (digits_latent, "objective=flow,debug"),
}


def config_of(kind):
  file, variants = CONFIGS[kind]
  return file.get_config(variants)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_diffusion_trains_and_denoises_with_one_network(kind):
  config = config_of(kind)
  diffusion = kinds.make(config.diffusion)
  keys = jax.random.split(jax.random.key(0), 5)
  level = diffusion.sample_level(keys)
  np.testing.assert_array_equal(diffusion.sample_level(keys[3:]), level[3:])
  y, noise = jax.random.normal(jax.random.key(1), (2, 5, 4, 4, 2))
  network = lambda x, told: x * 0 + told[:, None, None, None] * 0
  losses = diffusion.train_losses(network, y, level, noise)
  assert losses.shape == (5,) and (losses > 0).all()
  assert diffusion.denoise(network, y, level).shape == y.shape
  process = kinds.row(config.diffusion).SOLVERS
  assert any(process in served for served in sampling.SOLVERS.values())
  assert kinds.is_latent(config) == (kind != "edm")


def test_what_a_kind_does_not_read_is_refused():
  config = config_of("adm")
  with config.unlocked():
    config.diffusion.P_std = 1.0
  with pytest.raises(UserError, match="P_std=1.0 is for diffusion.kind='edm'"):
    kinds.check_fields(config.diffusion)
  with pytest.raises(UserError, match=r"kind='ddpm': use one of \('edm', 'adm"):
    kinds.make({"kind": "ddpm"})


class Straight:
  """A third diffusion: x = y + level noise, and the network predicts y."""

  level = "time"

  def sample_level(self, keys):
    return jax.vmap(jax.random.uniform)(keys)

  def train_losses(self, network, y, level, noise):
    x = y + level[:, None, None, None] * noise
    return ((network(x, level) - y) ** 2).mean((1, 2, 3))

  def denoise(self, network, x, level):
    return network(x, level)


def test_a_new_kind_is_one_row(monkeypatch):
  """On images and on latents, to its loss and its sampler's options."""
  row = types.SimpleNamespace(
    make=lambda config: Straight(), FIELDS=(), SOLVERS="edm", ON_LATENTS=True
  )
  monkeypatch.setitem(kinds.KINDS, "straight", row)
  network = types.SimpleNamespace(
    num_classes=0, apply=lambda variables, x, level, labels: x
  )
  for config in map(config_of, CONFIGS):
    config.diffusion.kind = "straight"
    config.sampler.solver = "edm_heun"
    config.sampler.guidance_schedule = "constant"
    assert SamplerOptions.from_config(config).solver == "edm_heun"
    made = objective.make(network, config)
    batch = {
      "image": jnp.zeros((2, 4, 4, 1), jnp.uint8),
      "moments": jnp.zeros((2, 4, 4, 2)),
      "index": jnp.arange(2, dtype=jnp.uint32),
    }
    draws = made.draws(jax.random.key(0), batch)
    assert ("posterior_noise" in draws) == kinds.is_latent(config)
    losses = made.losses({}, batch, draws)
    expected = draws["time"] ** 2 * (draws["noise"] ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_new_solver_is_one_file_and_one_row(monkeypatch):
  monkeypatch.setitem(sampling.SOLVERS, "edm_twin", ("edm",))
  monkeypatch.setitem(sys.modules, "diffit_jax.sampling.edm_twin", edm_heun)
  assert sampling.by_process() == (
    "edm_heun or edm_twin for edm; ddpm, ddim, dpmpp_2m or unipc for adm;"
    " dpmpp_2m, unipc, euler, heun or euler_maruyama for flow"
  )
  made = sampling.make_solver("edm_twin", 18, rho=5.0)
  np.testing.assert_array_equal(
    made.levels, edm_heun.make_solver(18, rho=5.0).levels
  )
  config = config_of("edm")
  config.sampler.solver = "edm_twin"
  assert SamplerOptions.from_config(config).solver == "edm_twin"
  config = config_of("adm")
  config.sampler.solver = "edm_twin"
  with pytest.raises(UserError, match="use edm_heun or edm_twin for edm; "):
    SamplerOptions.from_config(config)


def test_every_row_is_a_module_of_its_name():
  for name in sampling.SOLVERS:
    module = sampling.make_solver(name, 4).query.__module__
    shared = (ddim.discrete, euler.continuous, edm_heun)
    own = f"diffit_jax.sampling.{name}"
    assert module in (own, *(each.__name__ for each in shared))
