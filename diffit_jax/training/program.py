"""Everything a config turns into before there is any data: model to step."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.training import objective, step
from diffit_jax.training.optimizer import make_optimizer
from diffit_jax.training.state import TrainState, abstract_state, make_init


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
  config: config_dict.ConfigDict, devices: list[jax.Device] | None = None
) -> Program:
  """Builds the program and refuses what cannot work, before any allocation.

  Args:
    config: the resolved config.
    devices: of the mesh; None is all there are.
  """
  if config.diffusion.kind != "edm":
    raise UserError(f"diffusion.kind={config.diffusion.kind!r}: use 'edm'")
  check_consistent(config)
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  mesh_lib.check_batch(mesh, config.batch_size, "batch_size")
  model = models.make_model(config.model)
  optimizer = make_optimizer(config.optimizer, config.batch_size)
  init = make_init(lambda: init_params(model, config), optimizer, config.ema)
  abstract = abstract_state(init, mesh)
  pure_step = step.make_step(
    objective.edm_loss(model, config.diffusion),
    optimizer,
    config.ema,
    batch_size=config.batch_size,
    seed=config.seed,
    matmul_precision=config.matmul_precision,
  )
  train_step = step.compile_step(pure_step, mesh, abstract)
  return Program(model, mesh, init, abstract, train_step)


def check_consistent(config: config_dict.ConfigDict) -> None:
  """Fields of different sections that must agree."""
  if config.model.num_classes not in (0, config.data.num_classes):
    raise UserError(
      f"model.num_classes={config.model.num_classes} must be 0 or"
      f" data.num_classes={config.data.num_classes}"
    )
  wanted = 9 if config.diffusion.augment_prob else 0
  if config.model.augment_dim != wanted:
    raise UserError(
      f"model.augment_dim={config.model.augment_dim} must be {wanted} with"
      f" diffusion.augment_prob={config.diffusion.augment_prob}"
    )
  for field in ("total_steps", "log_every_steps", "save_every_steps"):
    if config[field] < 1:
      raise UserError(f"{field}={config[field]} must be at least 1")


def init_params(model: nn.Module, config: config_dict.ConfigDict):
  """Fresh parameters from the config's seed."""
  side = config.data.resolution
  x = jnp.zeros((1, side, side, model.channels))
  return model.init(jax.random.key(config.seed), x, jnp.zeros(1))["params"]


def batch_shapes(config: config_dict.ConfigDict) -> dict:
  """Abstract global batch, for compiling ahead of time."""
  b, side = config.batch_size, config.data.resolution
  image = (b, side, side, config.model.channels)
  return {
    "image": jax.ShapeDtypeStruct(image, jnp.uint8),
    "label": jax.ShapeDtypeStruct((b,), jnp.int32),
    "index": jax.ShapeDtypeStruct((b,), jnp.uint32),
  }
