"""Everything a config turns into before there is any data: model to step."""

from collections.abc import Callable
import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax import models, ranges
from diffit_jax.diffusion import precond
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.run import ema
from diffit_jax.run.checkpoint import BEST_BY
from diffit_jax.run.state import (
  TrainState,
  abstract_monitor,
  abstract_state,
  make_init,
)
from diffit_jax.training import cost, objective, step
from diffit_jax.training.optimizer import make_optimizer

# Fields of config.diffusion that only one kind reads.
DIFFUSIONS = {
  "edm": ("precond", "sigma_data", "P_mean", "P_std", "augment_prob"),
  "adm": ("num_steps",),
}


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
  check_consistent(config)
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  _check_batch(mesh, config)
  model = models.make_model(config.model)
  platform = mesh.devices.flat[0].platform
  kernels.check_machine(model.attention, platform, model.dtype.name)
  optimizer = make_optimizer(config.optimizer, config.batch_size)
  init = make_init(
    lambda: init_params(model, config.data.resolution, config.seed),
    optimizer,
    config.ema,
  )
  abstract = abstract_state(init, mesh)
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


def make_loss(
  model: nn.Module, config: config_dict.ConfigDict, mesh: Mesh
) -> objective.Loss:
  """The run's loss with every array kept in its place on the mesh."""
  placed = model.clone(
    constrain=sharding.constrain_batch(mesh),
    map_params=sharding.gather(mesh, model.dtype),
  )
  if config.diffusion.kind == "edm":
    loss = objective.edm_loss(placed, config.diffusion)
  else:
    scaling_factor = config.autoencoder.scaling_factor
    loss = objective.adm_loss(placed, config.diffusion, scaling_factor)

  def gathered_loss(params, batch, key):
    params = sharding.gather_outside_blocks(mesh, params)
    return loss(params, batch, key)

  return gathered_loss


def _check_batch(mesh: Mesh, config: config_dict.ConfigDict) -> None:
  mesh_lib.check_batch(mesh, config.batch_size, "batch_size")
  parts = config.num_microbatches
  if config.batch_size % (parts * mesh.size):
    raise UserError(
      f"num_microbatches={parts} does not divide the"
      f" {config.batch_size // mesh.size} images of each device"
    )


def check_consistent(config: config_dict.ConfigDict) -> None:
  """Refuses fields out of range, and those that do not go together."""
  ranges.check(config)
  model, diffusion = config.model, config.diffusion
  if diffusion.kind not in DIFFUSIONS:
    raise UserError(
      f"diffusion.kind={diffusion.kind!r}: use one of {tuple(DIFFUSIONS)}"
    )
  for kind, fields in DIFFUSIONS.items():
    found = [f for f in fields if kind != diffusion.kind and diffusion.get(f)]
    if found:
      raise UserError(
        f"diffusion.{found[0]}={diffusion[found[0]]!r} is for"
        f" diffusion.kind={kind!r}, and this is {diffusion.kind!r}: leave it"
        " out"
      )
  if diffusion.kind == "edm":
    precond.make(diffusion)  # refuses what it does not know
  names = tuple(models.NETWORKS[diffusion.kind])
  if model.name not in names:
    raise UserError(
      f"model.name={model.name!r}: use one of {names} with"
      f" diffusion.kind={diffusion.kind!r}"
    )
  network = models.make_model(model)  # refuses fields that it does not have
  if diffusion.label_drop_prob and not getattr(network, "null_label", True):
    raise UserError(
      f"diffusion.label_drop_prob={diffusion.label_drop_prob} needs a label for"
      " none, which model.null_label=False leaves out: set one of the two"
    )
  if network.num_classes not in (0, config.data.num_classes):
    raise UserError(
      f"model.num_classes={network.num_classes} must be 0 or"
      f" data.num_classes={config.data.num_classes}"
    )
  side = getattr(network, "input_size", config.data.resolution)
  if side != config.data.resolution:
    raise UserError(
      f"model.input_size={side} must be the side of the latents,"
      f" data.resolution={config.data.resolution}"
    )
  wanted = 9 if diffusion.get("augment_prob") else 0
  found = model.get("augment_dim", 0)
  if found != wanted:
    raise UserError(
      f"model.augment_dim={found} must be {wanted} with"
      f" diffusion.augment_prob={diffusion.get('augment_prob', 0)}"
    )
  _check_rest(config)


def _check_rest(config: config_dict.ConfigDict) -> None:
  """Names, and numbers that depend on another."""
  if config.keep_every_steps % config.save_every_steps:
    raise UserError(
      f"keep_every_steps={config.keep_every_steps} must be a multiple of"
      f" save_every_steps={config.save_every_steps}: no other step is saved"
    )
  precisions = ("default", "high", "highest")
  if config.matmul_precision not in precisions:
    raise UserError(
      f"matmul_precision={config.matmul_precision!r}: use one of {precisions}"
    )
  for name, rule in config.ema.items():
    if rule.kind not in ema.KINDS:
      raise UserError(
        f"ema.{name}.kind={rule.kind!r}: use one of {tuple(ema.KINDS)}"
      )
    for field in ema.KINDS[rule.kind]:
      if field not in rule:
        raise UserError(
          f"ema.{name}.kind={rule.kind!r} needs a field ema.{name}.{field},"
          f" and there is only {sorted(rule)}"
        )
  if config.snapshot_every_steps and not ema.power_averages(config.ema):
    raise UserError(
      f"snapshot_every_steps={config.snapshot_every_steps} stores averages of"
      f" kind 'power', and this config has none (only {sorted(config.ema)}):"
      " use the variant ema=power, or snapshot_every_steps=0"
    )
  distances = ()
  if config.get("evaluate_every_steps"):
    distances = filter(_is_distance, config.evaluation.metrics)
  allowed = sorted((*BEST_BY, *distances))
  if config.keep_best_by not in ("", *allowed):
    raise UserError(
      f"keep_best_by={config.keep_best_by!r}: use one of {allowed}, or '' to"
      " keep no best checkpoint; a distance, as fid, needs evaluate_every_steps"
      " and must be among evaluation.metrics"
    )


def _is_distance(metric: str) -> bool:
  """Whether less of it is better."""
  return metric.startswith(("fid", "sfid", "kid", "frechet", "kernel"))


def init_params(model: nn.Module, side: int, seed: int):
  """Fresh parameters, for images or latents of side x side."""
  x = jnp.zeros((1, side, side, model.channels), jnp.float32)
  key = jax.random.key(seed, impl=PRNG)
  return model.init(key, x, jnp.zeros(1, jnp.float32))["params"]


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
  if config.diffusion.kind == "edm":
    image = (b, side, side, channels)
    return batch | {"image": jax.ShapeDtypeStruct(image, jnp.uint8)}
  moments = (b, side, side, 2 * channels)
  return batch | {"moments": jax.ShapeDtypeStruct(moments, jnp.float32)}


def step_arguments(config: config_dict.ConfigDict, program: Program) -> tuple:
  """Abstract (state, monitor, batch) of a train step, with their shardings.

  They are all that training's own arguments are to the tracer, so that what was
  compiled for them is what training finds in the compilation cache.
  """
  whole = mesh_lib.batch_sharding(program.mesh)
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
    side: of the image or latent.
  """
  x = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  run = lambda params, x, t: model.apply({"params": params}, x, t)
  return cost.count_macs(run, params, x, t)
