"""What the training losses feed the network, seen by stand-ins for it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_latent, ffhq64
from diffit_jax import models
from diffit_jax.diffusion import adm
from diffit_jax.interop import files
from diffit_jax.training import objective

EDM = dict(
  sigma_data=0.5, P_mean=-1.2, P_std=1.2, augment_prob=0.0, label_drop_prob=0.1
)
KEY = jax.random.key(7)


class Recorder:
  """A network that keeps what it is given and answers with zeros."""

  def __init__(self, num_classes=0, channels_out=1):
    self.num_classes, self.channels_out = num_classes, channels_out

  def apply(self, variables, x, level, *rest, **named):
    self.seen = types.SimpleNamespace(x=x, level=level, rest=rest, **named)
    return jnp.zeros((*x.shape[:-1], self.channels_out))

  def compute(self, make_loss, *args):
    """Losses of `make_loss(self, *args)`; `seen` then holds plain arrays."""
    loss = make_loss(self, *args)

    @jax.jit
    def run(batch):
      losses = loss({}, batch, KEY)
      self.rngs = vars(self.seen).pop("rngs", None)
      return losses, vars(self.seen)

    def of(batch):
      losses, seen = run(batch)
      self.seen = types.SimpleNamespace(**seen)
      return losses

    return of


def image_batch(n, side=4, channels=1):
  rng = np.random.default_rng(0)
  shape = (n, side, side, channels)
  return {
    "image": jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
    "label": jnp.arange(n, dtype=jnp.int32) % 10,
    "index": jnp.arange(n, dtype=jnp.uint32) + 1000,
  }


def test_edm_loss_is_the_weighted_error_of_the_denoiser():
  """With F = 0 the denoiser is c_skip x, and all else can be read off."""
  batch, network = image_batch(6), Recorder()
  losses = network.compute(objective.edm_loss, EDM)(batch)
  sigma = np.exp(4 * np.asarray(network.seen.level, np.float64))
  variance = sigma**2 + 0.25
  x = network.seen.x * np.sqrt(variance)[:, None, None, None]  # 1 / c_in
  y = np.asarray(batch["image"], np.float64) / 127.5 - 1
  error = (0.25 / variance)[:, None, None, None] * x - y
  weight = variance / (sigma * 0.5) ** 2
  expected = weight * (error**2).sum((1, 2, 3))
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  # Dropout is on, keyed on the step and, inside the network, on the sample.
  np.testing.assert_array_equal(network.seen.sample_index, batch["index"])
  assert network.rngs["dropout"] is KEY
  noise = (x - y) / sigma[:, None, None, None]
  assert abs(noise.std() - 1) < 0.3  # 96 draws: a sigma of 0.07


def test_noise_levels_are_log_normal():
  network = Recorder()
  network.compute(objective.edm_loss, EDM)(image_batch(4000, side=1))
  log_sigma = 4 * np.asarray(network.seen.level)
  # Standard errors 0.019 and 0.013.
  assert abs(log_sigma.mean() + 1.2) < 0.1 and abs(log_sigma.std() - 1.2) < 0.07


@pytest.mark.parametrize("kind", ["edm", "adm"])
def test_labels_are_dropped_at_the_given_rate(kind):
  n, batch = 4000, image_batch(4000, side=1)
  network = Recorder(num_classes=10, channels_out=2)
  if kind == "edm":
    network.channels_out = 1
    network.compute(objective.edm_loss, EDM)(batch)
  else:
    batch["moments"] = jnp.zeros((n, 1, 1, 2))
    config = dict(num_steps=1000, label_drop_prob=0.1)
    network.compute(objective.adm_loss, config, 1.0)(batch)
  labels = np.asarray(network.seen.rest[0])
  dropped = labels == 10
  assert abs(dropped.mean() - 0.1) < 0.025  # a standard error of 0.005
  np.testing.assert_array_equal(labels[~dropped], batch["label"][~dropped])


def test_augmentation_reaches_image_and_labels():
  config = dict(EDM, augment_prob=1.0)
  network, batch = Recorder(channels_out=3), image_batch(8, 8, 3)
  network.compute(objective.edm_loss, config)(batch)
  augment_labels = np.asarray(network.seen.rest[1])
  assert augment_labels.shape == (8, 9) and np.abs(augment_labels).max() > 0.1
  plain = Recorder(channels_out=3)
  plain.compute(objective.edm_loss, EDM)(batch)
  assert plain.seen.rest[1] is None
  # Same noise level and noise: what differs is the image alone.
  np.testing.assert_array_equal(plain.seen.level, network.seen.level)
  assert np.abs(plain.seen.x - network.seen.x).max() > 0.1


def test_latents_are_drawn_from_the_scaled_posterior():
  n, scale = 3000, 0.25
  moments = np.zeros((n, 1, 1, 4), np.float32)
  moments[..., :2], moments[..., 2:] = 3.0, 2 * np.log(0.5)  # mean 3, std 0.5
  batch = image_batch(n, side=1) | {"moments": jnp.asarray(moments)}
  network = Recorder(num_classes=10, channels_out=4)
  config = dict(num_steps=1000, label_drop_prob=0.1)
  losses = network.compute(objective.adm_loss, config, scale)(batch)
  assert losses.shape == (n,)
  t = np.asarray(network.seen.level)
  assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 30
  abar = adm.make_schedule().alphas_cumprod[t][:, None]
  x = np.asarray(network.seen.x)[:, 0, 0]
  standard = (x - np.sqrt(abar) * scale * 3) / np.sqrt(
    abar * (scale * 0.5) ** 2 + 1 - abar
  )
  # 6,000 values of a unit normal: standard errors 0.013 and 0.009.
  assert abs(standard.mean()) < 0.06 and abs(standard.std() - 1) < 0.05
  early = standard[t < 100]  # where the posterior is most of the variance
  assert abs(early.std() - 1) < 0.12


@pytest.mark.parametrize("name", ["digits", "ffhq64", "digits_latent"])
def test_a_sample_meets_the_same_draws_in_any_row(name):
  config = {"digits": digits, "ffhq64": ffhq64, "digits_latent": digits_latent}[
    name
  ].get_config("debug")
  if name == "ffhq64":
    config.model.update(dict(dropout=0.3, window_size=2))
    config.data.resolution = 8
  model = models.make_model(config.model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32),
    files.parameter_shapes(config),
  )
  side, channels = config.data.resolution, config.model.channels
  batch = image_batch(4, side, channels)
  if config.diffusion.kind == "edm":
    loss = objective.edm_loss(model, config.diffusion)
  else:
    moments = rng.normal(size=(4, side, side, 2 * channels))
    batch["moments"] = jnp.asarray(moments, jnp.float32)
    loss = objective.adm_loss(model, config.diffusion, 1.0)
  loss = jax.jit(loss)
  order = np.array([2, 0, 3, 1])
  moved = {key: value[order] for key, value in batch.items()}
  whole = loss(params, batch, KEY)
  np.testing.assert_allclose(loss(params, moved, KEY), whole[order], rtol=1e-5)
  other = loss(params, batch | {"index": batch["index"] + 1}, KEY)
  assert (np.abs(other / whole - 1) > 1e-3).all()
