"""Options that a model, a diffusion or an average does not have."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from configs import cifar10, cifar10_song, digits, imagenet256
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.training import checks

NETWORKS = models.NETWORKS["edm"] | models.NETWORKS["adm"]
CONFIGS = {
  "image_diffit": lambda: digits.get_config("debug"),
  "ladder": lambda: cifar10.get_config("debug,rung=C"),
  "song_unet": lambda: cifar10_song.get_config("debug"),
  "latent_diffit": lambda: imagenet256.get_config("debug"),
  "dit": lambda: imagenet256.get_config("debug,modulation=dit"),
}


def fields_of(name):
  fields = inspect.signature(models.network_class(name)).parameters
  return set(fields) - {"parent"}


EVERY_FIELD = sorted(set().union(*map(fields_of, NETWORKS)) - {"name"})


@pytest.mark.parametrize("name", NETWORKS)
def test_every_field_is_the_models_or_is_refused_by_name(name):
  """All pairs of a model and a field that any model has."""
  config = CONFIGS[name]()
  checks.check_consistent(config)
  for field in EVERY_FIELD:
    if field in fields_of(name) or field in config.model:
      continue
    having = [n for n in NETWORKS if field in fields_of(n)]
    changed = config.copy_and_resolve_references().unlock()
    changed.model[field] = getattr(models.network_class(having[0]), field)
    message = f"^{name} has no field model.{field}: only .*{having[-1]} ha"
    with pytest.raises(UserError, match=message):
      checks.check_consistent(changed)


def set_field(config, path, value):
  section, _, field = path.rpartition(".")
  with config.unlocked():
    for name in section.split("."):
      config = config[name]
    config[field] = value


@pytest.mark.parametrize(
  "name, path, value, message",
  [
    ("dit", "model.augment_dim", 9, "dit has no field model.augment_dim"),
    (
      "latent_diffit",
      "diffusion.augment_prob",
      0.1,
      "augment_prob=0.1 is for diffusion.kind='edm', and this is 'adm'",
    ),
    ("latent_diffit", "diffusion.precond", "vp", "precond='vp' is for"),
    ("song_unet", "diffusion.num_steps", 1000, "num_steps=1000 is for"),
    (
      "dit",
      "model.null_label",
      False,
      "label_drop_prob=0.1 needs a label for none.*model.null_label=False",
    ),
    (
      "image_diffit",
      "ema.edm.kind",
      "constant",
      "ema.edm.kind='constant' needs a field ema.edm.decay",
    ),
    (
      "dit",
      "ema.constant.kind",
      "halflife",
      "kind='halflife' needs a field ema.constant.halflife_images",
    ),
  ],
)
def test_what_goes_with_another_kind_is_refused(name, path, value, message):
  config = CONFIGS[name]()
  set_field(config, path, value)
  with pytest.raises(UserError, match=message):
    checks.check_consistent(config)


@pytest.mark.parametrize(
  "rung, field, value",
  [("A", "resize", "bilinear"), ("B", "skip", "add"), ("C", "time_in", "none")],
)
def test_options_that_change_nothing_in_a_rung_are_refused(rung, field, value):
  config = cifar10.get_config(f"debug,rung={rung}")
  config.model[field] = value
  model = models.make_model(config.model)
  with pytest.raises(UserError, match=f"model.{field}={value!r} changes"):
    jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)
    )
