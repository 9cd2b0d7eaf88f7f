"""The attention that Figure 2 shows is that of equation (6)."""

import jax
import numpy as np
import pytest

from benchmarks import attention_maps
from configs import cifar10_song, digits, imagenet256
from diffit_jax import models
from diffit_jax.environment import PRNG
from diffit_jax.generation.weights import Weights
from diffit_jax.models import attention
from diffit_jax.models.kernels import plain

HEADS, WIDTH, TIME, WINDOW = 2, 8, 5, 2


def softmax_by_hand(params, x, time):
  """Equations (3)-(6) in float64: [b, windows, heads, n, n] for a 4x4 map."""
  table = params["relative_position_bias_table"]
  linear = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
  out = np.zeros((len(x), 4, HEADS, 4, 4))
  for b in range(len(x)):
    qkv = linear("qkv", x[b]) + linear("qkv_temb", time[b])  # (3), (4)
    for w, h in np.ndindex(4, HEADS):
      rows, columns = 2 * (w // 2) + np.arange(2), 2 * (w % 2) + np.arange(2)
      tokens = [qkv[i, j] for i in rows for j in columns]
      d = WIDTH // HEADS
      for n, m in np.ndindex(4, 4):
        q = tokens[n][h * d : (h + 1) * d]
        k = tokens[m][WIDTH + h * d : WIDTH + (h + 1) * d]
        offset = (n // 2 - m // 2 + 1) * 3 + (n % 2 - m % 2 + 1)
        out[b, w, h, n, m] = q @ k / np.sqrt(d) + table[offset, h]
  out = np.exp(out)
  return out / out.sum(-1, keepdims=True)


def test_weights_are_the_softmax_of_the_equation():
  rng = np.random.default_rng(0)
  x, time = rng.normal(size=(2, 4, 4, WIDTH)), rng.normal(size=(2, TIME))
  module = attention.TMSA(HEADS, WINDOW)
  params = module.init(jax.random.key(0), x, time)["params"]
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 3, params)
  _, left = module.apply({"params": params}, x, time, mutable=["intermediates"])
  inputs = left["intermediates"][attention.INPUTS][0]
  np.testing.assert_allclose(
    plain.attention_weights(*inputs),
    softmax_by_hand(params, x, time),
    atol=1e-6,  # float32 logits of about 1
  )


def test_the_centre_token_and_its_window():
  """4x4 map in 2x2 windows: the centre (2, 2) is token 0 of the last."""
  weights = np.zeros((4, 2, 4, 4))
  weights[3, :, 0] = [[0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.3, 0.2]]
  found = attention_maps.centre_map(weights)
  assert np.isnan(found).sum() == 12
  np.testing.assert_allclose(found[2:, 2:], [[0.2, 0.2], [0.3, 0.3]])
  # One window: token (2, 2) of 16 is number 10.
  weights = np.eye(16)[None, None]
  assert np.argmax(attention_maps.centre_map(weights)) == 10


def follow(config, **kwargs):
  """Maps of a network of random weights."""
  model, side = models.make_model(config.model), config.data.resolution
  x = np.zeros((1, side, side, model.channels))
  init = lambda: model.init(jax.random.key(0), x, np.zeros(1))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape) / 4, jax.eval_shape(init)
  )
  loaded = Weights(params, config, step=0, ema="edm", source="made up")
  return attention_maps.follow(loaded, 4, seed=0, labels=None, **kwargs)


@pytest.mark.slow
def test_the_trajectory_is_that_of_the_samples():
  """It begins at 80 times the noise of sample 0, and falls to 0.002."""
  config = digits.get_config("debug")
  maps = follow(config, columns=2)
  key = jax.random.fold_in(jax.random.key(0, impl=PRNG), 0)
  noise = jax.random.normal(jax.random.split(key)[0], (8, 8, 1))
  np.testing.assert_allclose(maps.states[0], 80 * noise, rtol=1e-5)
  np.testing.assert_allclose(maps.levels, [80, 0.002], rtol=1e-5)


@pytest.mark.slow
def test_a_whole_model(tmp_path):
  config = digits.get_config("debug")
  config.model.channel_mult = (1, 2)
  maps = follow(config, columns=3)
  assert list(maps.weights) == [
    "encoder_0_block_0",
    "encoder_1_block_0",
    "decoder_0_block_0",
  ]
  for block, each in maps.weights.items():
    windows = 1 if block.startswith("encoder_1") else 4
    assert each.shape == (3, 4, windows, each.shape[3], 16, 16)
    np.testing.assert_allclose(each.sum(-1), 1, atol=1e-5)
  still = np.repeat(maps.weights["encoder_0_block_0"][:1], 3, axis=0)
  assert attention_maps.moved(still) == 0
  assert attention_maps.table([maps]).count("\n") == 4
  attention_maps.draw([maps], 2, str(tmp_path / "new" / "maps.png"))
  assert (tmp_path / "new" / "maps.png").stat().st_size > 5_000


class Recorder:
  """A network that keeps what it is asked."""

  def apply(self, variables, x, level, labels, mutable):
    del variables, labels
    assert mutable == ["intermediates"]
    self.asked = x, level
    return x, {"intermediates": {}}


def test_the_maps_see_what_the_sampler_feeds_the_network():
  """VP: x / sqrt(sigma^2 + 1) and 999 t(sigma), not EDM's; ADM: x and t."""
  x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
  network = Recorder()

  def asked(config, level):
    attention_maps.attention_weights(network, config, None)({}, x, level)
    return network.asked

  config = cifar10_song.get_config("debug,tmsa")
  sigma = np.array([0.3, 5.0])
  scaled, c_noise = asked(config, np.float32(sigma))
  c_in = 1 / np.sqrt(sigma**2 + 1)
  np.testing.assert_allclose(scaled, c_in[:, None, None, None] * x, rtol=1e-6)
  t = (np.sqrt(0.01 + 39.8 * np.log1p(sigma**2)) - 0.1) / 19.9
  np.testing.assert_allclose(c_noise, 999 * t, rtol=1e-6)
  latent = imagenet256.get_config("debug")
  latent.model.scan_blocks = False
  fed, t = asked(latent, np.array([9]))
  assert fed is x and t == 9


@pytest.mark.slow
def test_a_latent_model_with_its_blocks_in_a_loop():
  maps = follow(imagenet256.get_config("debug"), columns=2)
  assert list(maps.weights) == ["blocks_0", "blocks_1"]
  assert maps.levels.tolist() == [999, 0]
  assert maps.weights["blocks_1"].shape == (2, 4, 1, 2, 4, 4)
