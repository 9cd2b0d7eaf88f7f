"""What the compiled step does across devices, and that no number depends on it.

The reference is one device, one batch, nothing recomputed, nothing placed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_latent
from diffit_jax.errors import UserError
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.run import state
from diffit_jax.training import objective, step
from diffit_jax.training import program as program_lib
from slow import all_but, slow

CONFIGS = {"digits": digits, "digits_latent": digits_latent}
FAST = ("digits_latent",)
BATCH = 16
# Sums over the batch in another order, in float32.
RTOL = 2e-5


def make_config(name, **changes):
  config = CONFIGS[name].get_config("debug")
  config.batch_size = BATCH
  if name == "digits":
    config.model.channel_mult = (1, 2)
    config.model.dropout = 0.2
  config.update_from_flattened_dict(changes)
  return config


def random_batch(config, number=0):
  rng = np.random.default_rng(number)
  shapes = program_lib.batch_shapes(config)
  batch = {
    name: (
      rng.normal(size=x.shape)
      if x.dtype == jnp.float32
      else rng.integers(0, 3 if name == "label" else 255, x.shape)
    ).astype(x.dtype)
    for name, x in shapes.items()
  }
  return batch | {"index": np.arange(BATCH, dtype=np.uint32) + BATCH * number}


def random_params(program):
  """Parameters for which every part of the network matters."""
  params = program.abstract.params
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  fresh = [0.2 * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves]
  placed = [jax.device_put(x, y.sharding) for x, y in zip(fresh, leaves)]
  return tree.unflatten(placed)


def loss_and_gradient(config, num_devices):
  """(loss, gradient) of one whole batch as the train step takes them."""
  program = program_lib.build(config, jax.devices()[:num_devices])
  loss = program_lib.make_loss(program.model, config, program.mesh)
  key = jax.random.key(0)

  @jax.jit
  def run(params, batch):
    mean = lambda params, part: jnp.mean(loss(params, part, key))
    return step.accumulate(
      jax.value_and_grad(mean),
      params,
      step.split_batch(batch, config.num_microbatches, program.mesh),
    )

  batch = sharding.put_batch(program.mesh, random_batch(config))
  return jax.device_get(run(random_params(program), batch))


@functools.cache
def reference(name):
  """(loss, gradient) of the loss as the equations have it."""
  config = make_config(name)
  program = program_lib.build(config, jax.devices()[:1])
  made = objective.make(program.model, config)

  def mean(params, batch):
    draws = made.draws(jax.random.key(0), batch)
    return jnp.mean(made.losses(params, batch, draws))

  return jax.device_get(
    jax.jit(jax.value_and_grad(mean))(
      random_params(program), random_batch(config)
    )
  )


@pytest.mark.parametrize("name", all_but(FAST, CONFIGS))
@pytest.mark.parametrize(
  "num_devices, changes",
  [
    slow(1, {"model.remat": "dots", "num_microbatches": 4}),
    (8, {"mesh.fsdp": 4, "num_microbatches": 2, "model.remat": "full"}),
  ],
  ids=str,
)
def test_loss_and_gradient_are_those_of_one_device(
  name, num_devices, changes
):
  loss, gradient = loss_and_gradient(make_config(name, **changes), num_devices)
  expected_loss, expected = reference(name)
  np.testing.assert_allclose(loss, expected_loss, rtol=RTOL)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=RTOL * scale),
    gradient,
    expected,
  )


def test_every_row_is_in_one_part_and_stays_on_its_device():
  mesh = mesh_lib.make_mesh(2, 4)
  batch = sharding.put_batch(mesh, {"index": np.arange(32)})
  parts = jax.jit(lambda x: step.split_batch(x, 2, mesh))(batch)["index"]
  assert parts.shape == (2, 16)
  assert sorted(np.ravel(parts)) == list(range(32))
  before = {
    s.device: set(np.ravel(s.data)) for s in batch["index"].global_shards
  }
  for shard in parts.global_shards:
    assert set(np.ravel(shard.data)) == before[shard.device]


def test_parts_that_do_not_divide_are_refused():
  config = make_config("digits", num_microbatches=4)
  with pytest.raises(UserError, match="num_microbatches=4 does not divide the"):
    program_lib.build(config)  # 2 images on each of 8 devices


def compiled_step(config) -> str:
  program = program_lib.build(config)
  monitor = jax.eval_shape(lambda: state.new_monitor(program.mesh))
  batch = program_lib.batch_shapes(config)
  return (
    program.train_step.lower(program.abstract, monitor, batch)
    .compile()
    .as_text()
  )


def moves(text: str, kind: str) -> list[str]:
  """The lines of a compiled program with a collective of one kind."""
  return [x for x in text.splitlines() if re.search(rf" {kind}(-start)?\(", x)]


@pytest.mark.parametrize("name", all_but(FAST, CONFIGS))
def test_only_weights_and_gradients_cross_devices(name):
  """No activation moves: weights are gathered, gradients are summed."""
  text = compiled_step(
    make_config(name, **{"mesh.fsdp": 4, "num_microbatches": 2})
  )
  for kind in ("all-to-all", "collective-permute"):
    assert not moves(text, kind), moves(text, kind)[0]
  assert moves(text, "all-gather") and moves(text, "all-reduce")


@pytest.mark.slow
def test_without_placing_activations_would_cross(monkeypatch):
  """So the test above can fail."""
  same = lambda *args: args[-1]
  monkeypatch.setattr(sharding, "constrain_batch", lambda mesh: lambda x: x)
  monkeypatch.setattr(sharding, "gather", lambda *args: lambda x: x)
  monkeypatch.setattr(sharding, "gather_outside_blocks", same)
  text = compiled_step(make_config("digits_latent", **{"mesh.fsdp": 4}))
  assert moves(text, "all-to-all") or moves(text, "collective-permute")


def test_weights_travel_in_the_type_they_are_used_in():
  mesh = mesh_lib.make_mesh(2, 4)
  params = {
    "linear": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "table": jnp.ones((4, 4)),
  }
  out = jax.jit(sharding.gather(mesh, jnp.bfloat16))(params)
  found = jax.tree.map(lambda x: x.dtype.name, out)
  assert found == {
    "linear": {"kernel": "bfloat16", "bias": "bfloat16"},
    "norm": {"scale": "float32", "bias": "float32"},
    "table": "float32",  # TMSA's bias
  }
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(out))


def test_backward_pass_of_one_device_keeps_no_weights():
  """Where nothing is gathered, blocks use their arguments and no copies."""
  program = program_lib.build(make_config("digits_latent"), jax.devices()[:1])
  config, params = make_config("digits_latent"), program.abstract.params
  loss = program_lib.make_loss(program.model, config, program.mesh)
  batch, key = random_batch(config), jax.random.key(0)
  backward = lambda params: jax.vjp(lambda p: loss(p, batch, key), params)[1]
  jaxpr = jax.make_jaxpr(backward)(params).jaxpr
  given = {id(var) for var in jaxpr.invars}
  kept = {var.aval.shape for var in jaxpr.outvars if id(var) not in given}
  kernels = {x.shape for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3}
  assert kept and kernels and not kept & kernels


def test_gradients_and_state_are_float32_under_bfloat16_blocks():
  config = make_config(
    "digits_latent", **{"mesh.fsdp": 4, "model.dtype": "bfloat16"}
  )
  program = program_lib.build(config)
  loss = program_lib.make_loss(program.model, config, program.mesh)
  mean = lambda params, batch: jnp.mean(loss(params, batch, jax.random.key(0)))
  gradient = jax.eval_shape(
    jax.grad(mean), program.abstract.params, program_lib.batch_shapes(config)
  )
  found = jax.tree.leaves((gradient, program.abstract))
  floats = {x.dtype for x in found if jnp.issubdtype(x.dtype, jnp.floating)}
  assert floats == {np.dtype("float32")}
