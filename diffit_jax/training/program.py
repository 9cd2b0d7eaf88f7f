"""Everything a config turns into before there is any data: model to step."""

from collections.abc import Callable
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax import models
from diffit_jax.diffusion import kinds
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import AUTO, PLAIN
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.run.state import (
  TrainState,
  abstract_monitor,
  abstract_state,
  make_init,
)
from diffit_jax.training import checks, cost, objective, step
from diffit_jax.training.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Program:
  """A training run's parts, none of which holds an array yet.

  Attributes:
    model: the network.
    mesh: the devices.
    init: () -> TrainState, to be jitted.
    abstract: shapes, dtypes and shardings of the state.
    train_step: jitted (state, monitor, batch) -> (state, monitor), the first
      two donated.
  """

  model: nn.Module
  mesh: Mesh
  init: Callable[[], TrainState]
  abstract: TrainState
  train_step: Callable


def build(
  config: config_dict.ConfigDict,
  devices: list[jax.Device] | None = None,
  attention: str | None = None,
) -> Program:
  """Builds the program and refuses what cannot work, before any allocation.

  Args:
    config: the resolved config.
    devices: devices of the mesh; None is all there are.
    attention: kernel in place of `model.attention`; None is that one, or what
      `auto` stands for on these devices.
  """
  checks.check_consistent(config)
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  _check_batch(mesh, config)
  model = models.make_model(config.model)
  optimizer = make_optimizer(config.optimizer, config.batch_size)
  init = make_init(
    lambda: init_params(model, config.data.resolution, config.seed),
    optimizer,
    config.ema,
  )
  abstract = abstract_state(init, mesh)
  model = _with_kernel(model, config, mesh, attention)
  loss = make_loss(model, config, mesh)
  pure_step = step.make_step(
    loss,
    optimizer,
    config.ema,
    batch_size=config.batch_size,
    seed=config.seed,
    matmul_precision=config.matmul_precision,
    num_microbatches=config.num_microbatches,
    mesh=mesh,
  )
  train_step = step.compile_step(pure_step, mesh, abstract)
  return Program(model, mesh, init, abstract, train_step)


def _with_kernel(model, config, mesh: Mesh, attention: str | None):
  """The network with a kernel that serves it on these devices."""
  side, device = config.data.resolution, mesh.devices.flat[0]
  machine = device.platform, device.device_kind, model.dtype.name
  if attention or model.attention == AUTO:
    chosen = kernels.choose(model.attention_shapes(side), *machine)
    model = model.clone(attention=attention or chosen)
  model.check_compute(side)
  kernels.check_machine(model.attention, *machine)
  return model


def make_loss(
  model: nn.Module, config: config_dict.ConfigDict, mesh: Mesh
) -> step.Loss:
  """The run's loss with every array kept in its place on the mesh."""
  placed = model.clone(
    constrain=sharding.constrain_batch(mesh),
    per_device=sharding.per_device(mesh),
    map_params=sharding.gather(mesh, model.dtype),
  )
  made = objective.make(placed, config)

  def gathered_loss(params, batch, key):
    params = sharding.gather_outside_blocks(mesh, params)
    return made.losses(params, batch, made.draws(key, batch))

  return gathered_loss


def _check_batch(mesh: Mesh, config: config_dict.ConfigDict) -> None:
  mesh_lib.check_batch(mesh, config.batch_size, "batch_size")
  parts = config.num_microbatches
  if config.batch_size % (parts * mesh.size):
    raise UserError(
      f"num_microbatches={parts} does not divide the"
      f" {config.batch_size // mesh.size} images of each device"
    )


def init_params(model: nn.Module, side: int, seed: int):
  """Fresh parameters, for images or latents of side x side."""
  x = jnp.zeros((1, side, side, model.channels), jnp.float32)
  key = jax.random.key(seed, impl=PRNG)
  # With no kernel that the compiler cannot split: only parameters come of it.
  plain = model.clone(attention=PLAIN)
  return plain.init(key, x, jnp.zeros(1, jnp.float32))["params"]


def batch_shapes(config: config_dict.ConfigDict) -> dict:
  """Abstract global batch of the step."""
  b, side, channels = (
    config.batch_size,
    config.data.resolution,
    config.model.channels,
  )
  batch = {
    "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    "index": jax.ShapeDtypeStruct((b,), jnp.uint32),
  }
  if kinds.is_latent(config):
    moments = (b, side, side, 2 * channels)
    return batch | {"moments": jax.ShapeDtypeStruct(moments, jnp.float32)}
  image = (b, side, side, channels)
  return batch | {"image": jax.ShapeDtypeStruct(image, jnp.uint8)}


def step_arguments(config: config_dict.ConfigDict, program: Program) -> tuple:
  """Abstract (state, monitor, batch) of a train step, with their shardings.

  They are all that training's own arguments are to the tracer, so that what was
  compiled for them is what training finds in the compilation cache.
  """
  whole = sharding.batch_sharding(program.mesh)
  batch = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
    for name, leaf in batch_shapes(config).items()
  }
  return program.abstract, abstract_monitor(program.mesh), batch


def argument_bytes(
  config: config_dict.ConfigDict, program: Program
) -> tuple[int, int]:
  """Bytes of the state and of the batch on each device."""
  local = lambda leaf: (
    leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
  )
  state, _, batch = step_arguments(config, program)
  total = lambda tree: sum(map(local, jax.tree.leaves(tree)))
  return total(state), total(batch)


def forward_macs(model: nn.Module, params, side: int) -> cost.Macs:
  """Multiply-accumulates of one network evaluation of one image.

  Args:
    model: the network.
    params: its parameters, abstract ones will do.
    side: side of the image or latent.
  """
  x = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  run = lambda params, x, t: model.apply({"params": params}, x, t)
  return cost.count_macs(run, params, x, t)
