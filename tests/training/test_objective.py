"""What the training losses feed the network, seen by stand-ins for it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_latent, ffhq64
from diffit_jax import models
from diffit_jax.diffusion import adm, augment
from diffit_jax.interop import files
from diffit_jax.training import objective
from slow import slow

EDM = dict(
  kind="edm",
  sigma_data=0.5,
  P_mean=-1.2,
  P_std=1.2,
  augment_prob=0.0,
  label_drop_prob=0.1,
)
ADM = dict(kind="adm", num_steps=1000, label_drop_prob=0.1)
KEY = jax.random.key(7)


class Recorder:
  """A network that keeps what it is given and answers with zeros."""

  def __init__(self, num_classes=0, channels_out=1, dropout=0.0):
    self.num_classes, self.channels_out = num_classes, channels_out
    self.dropout = dropout

  def apply(self, variables, x, level, labels, **named):
    self.seen = types.SimpleNamespace(x=x, level=level, labels=labels, **named)
    return jnp.zeros((*x.shape[:-1], self.channels_out))

  def compute(self, *args):
    """Losses of `make(self, *args)`; `seen` then holds plain arrays."""
    made = objective.make(self, *args)

    @jax.jit
    def run(batch):
      losses = made.losses({}, batch, made.draws(KEY, batch))
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
  batch, network = image_batch(6), Recorder(dropout=0.1)
  losses = network.compute(EDM)(batch)
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
  network.compute(EDM)(image_batch(4000, side=1))
  log_sigma = 4 * np.asarray(network.seen.level)
  # Standard errors 0.019 and 0.013.
  assert abs(log_sigma.mean() + 1.2) < 0.1 and abs(log_sigma.std() - 1.2) < 0.07


@pytest.mark.parametrize("kind", ["edm", "adm"])
def test_labels_are_dropped_at_the_given_rate(kind):
  n, batch = 4000, image_batch(4000, side=1)
  network = Recorder(num_classes=10, channels_out=2)
  if kind == "edm":
    network.channels_out = 1
    network.compute(EDM)(batch)
  else:
    batch["moments"] = jnp.zeros((n, 1, 1, 2))
    network.compute(ADM, 1.0)(batch)
  labels = np.asarray(network.seen.labels)
  dropped = labels == 10
  assert abs(dropped.mean() - 0.1) < 0.025  # a standard error of 0.005
  np.testing.assert_array_equal(labels[~dropped], batch["label"][~dropped])


def test_augmentation_reaches_image_and_labels():
  config = dict(EDM, augment_prob=1.0)
  network, batch = Recorder(channels_out=3), image_batch(8, 8, 3)
  network.compute(config)(batch)
  augment_labels = np.asarray(network.seen.augment_labels)
  assert augment_labels.shape == (8, 9) and np.abs(augment_labels).max() > 0.1
  plain = Recorder(channels_out=3)
  plain.compute(EDM)(batch)
  assert not hasattr(plain.seen, "augment_labels")
  # Same noise level and noise: what differs is the image alone.
  np.testing.assert_array_equal(plain.seen.level, network.seen.level)
  assert np.abs(plain.seen.x - network.seen.x).max() > 0.1


def test_latents_are_drawn_from_the_scaled_posterior():
  n, scale = 3000, 0.25
  moments = np.zeros((n, 1, 1, 4), np.float32)
  moments[..., :2], moments[..., 2:] = 3.0, 2 * np.log(0.5)  # mean 3, std 0.5
  batch = image_batch(n, side=1) | {"moments": jnp.asarray(moments)}
  network = Recorder(num_classes=10, channels_out=4)
  losses = network.compute(ADM, scale)(batch)
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


@pytest.mark.parametrize(
  "name", [slow("digits"), "ffhq64", slow("digits_latent")]
)
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
  if config.diffusion.kind == "adm":
    moments = rng.normal(size=(4, side, side, 2 * channels))
    batch["moments"] = jnp.asarray(moments, jnp.float32)
  made = objective.make(model, config)
  loss = jax.jit(lambda p, b, key: made.losses(p, b, made.draws(key, b)))
  order = np.array([2, 0, 3, 1])
  moved = {key: value[order] for key, value in batch.items()}
  whole = loss(params, batch, KEY)
  np.testing.assert_allclose(loss(params, moved, KEY), whole[order], rtol=1e-5)
  other = loss(params, batch | {"index": batch["index"] + 1}, KEY)
  assert (np.abs(other / whole - 1) > 1e-3).all()


def flat(draws):
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(draws)
  }


@pytest.mark.parametrize("kind", ["edm", "adm"])
def test_draws_are_those_of_their_keys(kind):
  """By hand from fold_in(step key, index), split into four purposes."""
  batch = image_batch(3, side=2, channels=2)
  batch["moments"] = jnp.ones((3, 2, 2, 4))
  network = Recorder(num_classes=10, channels_out=2, dropout=0.1)
  if kind == "edm":
    made = objective.make(network, dict(EDM, augment_prob=0.5))
  else:
    made = objective.make(network, ADM, 0.5)
  draws = jax.jit(made.draws)(KEY, batch)
  assert draws.pop("dropout_key") == KEY
  expected = []
  for index, label in zip(batch["index"], batch["label"]):
    data, level, noise, dropped = jax.random.split(
      jax.random.fold_in(KEY, index), 4
    )
    drop = jax.random.bernoulli(dropped, jnp.float32(0.1))
    one = {
      "noise": jax.random.normal(noise, (2, 2, 2)),
      "labels": jnp.where(drop, 10, label),
    }
    if kind == "edm":
      one["augment"] = augment.draw_one(data, 0.5)
      one["sigma"] = jnp.exp(-1.2 + 1.2 * jax.random.normal(level))
    else:
      one["posterior_noise"] = jax.random.normal(data, (2, 2, 2))
      one["t"] = jax.random.randint(level, (), 0, 1000)
    expected.append(one)
  found = flat(draws)
  wanted = flat(jax.tree.map(lambda *each: jnp.stack(each), *expected))
  assert found.keys() == wanted.keys()
  for name in found:
    np.testing.assert_allclose(
      found[name], wanted[name], rtol=1e-6, atol=1e-7, err_msg=name
    )


def test_losses_are_a_function_of_what_was_drawn():
  """Given draws, the step's key and the labels in the batch do not matter."""
  batch = image_batch(3, side=2)
  made = objective.make(Recorder(num_classes=10), EDM)
  draws = made.draws(KEY, batch)
  losses = made.losses({}, batch, draws)
  other = batch | {"label": batch["label"] + 1, "index": batch["index"] + 5}
  np.testing.assert_array_equal(made.losses({}, other, draws), losses)
  # By hand, with F = 0: D = c_skip x.
  y = np.float64(batch["image"]) / 127.5 - 1
  sigma = np.float64(draws["sigma"])[:, None, None, None]
  D = 0.25 / (sigma**2 + 0.25) * (y + sigma * np.float64(draws["noise"]))
  weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
  expected = (weight * (D - y) ** 2).sum((1, 2, 3))
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  # Without classes there is no label, without dropout no key.
  plain = objective.make(Recorder(), EDM).draws(KEY, batch)
  assert plain["labels"] is None and set(plain) == {"sigma", "noise", "labels"}


@pytest.mark.parametrize("config", [digits, digits_latent])
def test_the_whole_config_and_its_section_make_the_same(config):
  config = config.get_config("debug")
  section = config.get("autoencoder", {})
  whole = objective.make(Recorder(), config)
  part = objective.make(
    Recorder(), config.diffusion, section.get("scaling_factor")
  )
  assert whole.data == part.data
  assert whole.diffusion.level == part.diffusion.level
