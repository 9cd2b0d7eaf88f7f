"""Another network as a guide: what it does to samples, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import digits, digits_latent
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.generation import description, generator, weights
from diffit_jax.interop import files
from diffit_jax.parallel.mesh import make_mesh
from slow import all_but

INDEX, LABELS = np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.int32)
MESH = make_mesh(devices=jax.devices()[:1])
CONFIGS = {
  "edm": (digits, "debug"),
  "adm": (digits_latent, "debug"),
  "flow": (digits_latent, "objective=flow,debug"),
}


def made_up(kind: str, seed: int, **model) -> weights.Weights:
  """Random weights of a debug network, some of its fields changed."""
  file, variants = CONFIGS[kind]
  config = file.get_config(variants)
  config.sampler.guidance_scale = 1.0
  for field, value in model.items():
    config.model[field] = value
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape, scale=0.1).astype(a.dtype),
    files.parameter_shapes(config),
  )
  return weights.Weights(params, config, 4, "edm", "a test")


def run(main: weights.Weights, w: float, other=None, **sampler):
  config = main.config.copy_and_resolve_references()
  config.sampler.update(dict(guide_scale=w, **sampler))
  generate = generator.make_generator(
    models.make_model(config.model), config, MESH, guide=other
  )
  return np.asarray(generate(main.params, 0, INDEX, LABELS), np.float64)


SMALLER = {
  "edm": dict(time_dim=8),
  "adm": dict(depth=1, hidden_dim=8),
  "flow": dict(depth=1, hidden_dim=8),
}


@pytest.mark.parametrize("kind", all_but(["adm"], CONFIGS))
def test_the_guide_leads_away_from_what_it_predicts(kind):
  """A weight of 0 is its own sample, but for ADM's variance."""
  main, other = made_up(kind, 0), made_up(kind, 1, **SMALLER[kind])
  alone, led = run(main, 1.0), run(main, 2.0, other)
  assert np.abs(alone - led).max() > 1e-2
  one = 1 if kind == "edm" else 1e-5  # of uint8
  same = run(main, 2.0, main)  # to rounding
  np.testing.assert_allclose(same, alone, rtol=1e-5, atol=one)
  if kind != "adm":
    guides = run(other, 1.0)
    found = run(main, 0.0, other)
    np.testing.assert_allclose(found, guides, rtol=1e-5, atol=one)


@pytest.mark.slow
def test_a_weight_of_0_is_the_guide_where_no_variance_counts():
  main, other = made_up("adm", 0), made_up("adm", 1, **SMALLER["adm"])
  ddim = dict(solver="ddim", steps=4, guidance_channels=0)
  guides, found = run(other, 1.0, **ddim), run(main, 0.0, other, **ddim)
  np.testing.assert_allclose(found, guides, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_kinds_of_guidance_at_once():
  main, other = made_up("flow", 0), made_up("flow", 1, **SMALLER["flow"])
  both = run(main, 2.0, other, guidance_scale=3.0)
  assert np.abs(both - run(main, 2.0, other)).max() > 1e-3
  assert np.abs(both - run(main, 1.0, guidance_scale=3.0)).max() > 1e-3


def test_a_guide_that_cannot_be_asked_at_pure_noise():
  main, other = made_up("flow", 0), made_up("flow", 1)
  other.config.diffusion.prediction = "eps"
  with pytest.raises(UserError, match="nothing of the data at t = 1"):
    run(main, 2.0, other)


def test_a_weight_without_a_guide_is_refused():
  with pytest.raises(UserError, match="guide_scale=2.0 needs a guide"):
    run(made_up("edm", 0), 2.0)


def write(tmp_path, made: weights.Weights) -> str:
  path = tmp_path / "guide.safetensors"
  files.write_weights(path, made.params, made.config, step=7, ema="edm")
  return str(path)


def test_a_guide_is_read_from_a_file_and_told(tmp_path):
  main, other = made_up("flow", 0), made_up("flow", 1, **SMALLER["flow"])
  path = write(tmp_path, other)
  found = weights.load_guide(path, MESH, main)
  led = dataclasses.replace(main, guide=found)
  told = description.describe(led, 0, "random", None)
  assert told["guide"]["step"] == 7 and told["about"]["guide_source"] == path
  sha = description.hash_tree(other.params)
  assert told["guide"]["weights_sha256"] == sha
  assert description.describe(main, 0, "random", None)["guide"] is None
  with pytest.raises(UserError, match="guide_step=3 goes with a workdir"):
    weights.load_guide(path, MESH, main, step=3)
  with pytest.raises(UserError, match="ema='p05': .* holds only 'edm'"):
    weights.load_guide(path, MESH, main, ema="p05")


@pytest.mark.parametrize(
  "kind, model, message",
  [
    ("adm", {}, "kind='adm' and this network with 'flow'.* same objective"),
    ("edm", {}, "kind='edm' and this network with 'flow'"),
    ("flow", dict(num_classes=3), "num_classes=3 and this network 10"),
    ("flow", dict(channels=2), "model.channels=2 and this network 4"),
  ],
)
def test_a_guide_that_does_not_fit_is_refused(kind, model, message, tmp_path):
  path = write(tmp_path, made_up(kind, 1, **model))
  with pytest.raises(UserError, match=message):
    weights.load_guide(path, MESH, made_up("flow", 0))


def test_a_guide_trained_on_latents_of_another_vae_is_told(tmp_path, caplog):
  main, other = made_up("flow", 0), made_up("flow", 1)
  for hashes, is_told in (("ab", True), ("aa", False), (("a", None), False)):
    caplog.clear()
    for weight, sha in zip((main, other), hashes):
      weight.config.data_identity = {"vae_hash": sha and sha * 64}
    weights.load_guide(write(tmp_path, other), MESH, main)
    assert ("latents of another VAE (SHA-256 bbbb" in caplog.text) == is_told


def test_a_guide_of_another_resolution_or_without_weights(tmp_path):
  other = made_up("flow", 1)
  other.config.data.resolution = other.config.model.input_size = 8
  other = dataclasses.replace(
    other,
    params=jax.tree.map(
      lambda a: np.zeros(a.shape, a.dtype), files.parameter_shapes(other.config)
    ),
  )
  main = made_up("flow", 0)
  with pytest.raises(UserError, match="data.resolution=8 and this network 4"):
    weights.load_guide(write(tmp_path, other), MESH, main)
  with pytest.raises(UserError, match="holds no run"):
    weights.load_guide(str(tmp_path / "nowhere"), MESH, main)
