"""A run in parts: the generator's samples, and what is seen on the way."""

import jax
import numpy as np
import pytest

from configs import digits, digits_latent
from diffit_jax.generation import generator, stepwise
from diffit_jax.interop import files
from diffit_jax.parallel.mesh import make_mesh
from slow import slow

INDEX, LABELS = np.arange(2, dtype=np.uint32), np.int32([3, 5])
MESH = make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize(
  "file, variants, fields",
  [
    slow(digits, "debug", dict(solver_options="S_churn=9.0", steps=4)),
    slow(
      digits_latent, "debug", dict(steps=6, guidance_interval=(200.0, 700.0))
    ),
    (digits_latent, "objective=flow,debug", dict(solver="unipc", steps=5)),
  ],
)
def test_parts_are_the_whole(file, variants, fields):
  """And the last prediction is the sample: the last step goes to it."""
  config = file.get_config(variants)
  for name, value in fields.items():
    config.sampler[name] = value
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape, scale=0.1).astype(a.dtype),
    files.parameter_shapes(config),
  )
  model = generator.make_model(config)
  generate = generator.make_generator(model, config, MESH)
  expected = generate(params, 7, INDEX, LABELS)

  watched = stepwise.Stepwise(model, config, MESH)
  run = watched.begin(params, 7, INDEX, LABELS)
  last = watched.num_evaluations - 1
  for stop in (0, 1, 3, last):
    run = watched.advance(run, stop)
    x, level, clean = watched.look(run)
    np.testing.assert_allclose(level, watched.levels[stop], rtol=1e-6)
    assert x.shape == clean.shape == expected.shape
  if expected.dtype == np.uint8:
    clean = watched.as_images(np.asarray(clean))
    difference = np.abs(clean.astype(int) - expected)
    assert difference.max() <= 1
  else:
    clean = np.asarray(clean) / config.autoencoder.scaling_factor
    scale = np.abs(expected).max()
    np.testing.assert_allclose(clean, expected, atol=1e-5 * scale)
