"""A compiled function from (weights, sample indices, labels) to images.

Sample i depends on (seed, i) alone: fold_in(key(seed), i) is split into one key
for its initial noise and one for the draws of a stochastic solver. Batch
size, device count and order change rounding at most.
"""

from collections.abc import Callable, Mapping
import dataclasses

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from diffit_jax import models, sampling
from diffit_jax.diffusion import kinds
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.models import kernels
from diffit_jax.models.compute import AUTO, PLAIN
from diffit_jax.models.kernels import probe
from diffit_jax.parallel import runtime
from diffit_jax.parallel.sharding import (
  batch_sharding,
  per_device,
  place,
  replicated,
)
from diffit_jax.pictures import to_uint8


def make_network(
  model: nn.Module, params, config: Mapping
) -> Callable[..., jax.Array]:
  """The function (x, level, labels) that the config's solvers are made for.

  Args:
    model: network of `config.model`.
    params: its parameters.
    config: the whole config.

  Returns:
    (x [b, h, w, c], level [b], labels [b]) -> `denoise` of `kinds`.
  """
  diffusion = kinds.make(config["diffusion"])

  def denoise(x, level, labels):
    network = lambda x, level: model.apply({"params": params}, x, level, labels)
    return diffusion.denoise(network, x, level)

  return denoise


def make_generator(
  model: nn.Module, config: Mapping, mesh: Mesh, codec=None, guide=None
) -> Callable[..., np.ndarray]:
  """The function (params, seed, index [b], labels [b]) -> what the model makes.

  Args:
    model: network of `config.model`.
    config: the whole config; data, diffusion, sampler and matmul_precision are
      read.
    mesh: the batch is split over all of it, weights are replicated.
    codec: decodes the latents of a latent model.
    guide: `weights.Weights` of the network that guides, if one does.

  Returns:
    A function with uint8 [b, h, w, c] images, or, of a latent model without a
    codec, float32 latents as the VAE gives them (unscaled).
  """
  recipe = Recipe.make(model, config, mesh, guide)
  options, is_latent = recipe.options, kinds.is_latent(config)

  def generate(params, guide_params, seed, index, labels):
    noise, keys = recipe.noise_and_keys(seed, index)
    guided, plain = recipe.denoisers(params, guide_params, labels)
    with jax.default_matmul_precision(config["matmul_precision"]):
      x = sampling.sample(
        guided,
        options.solver,
        noise,
        keys=keys,
        plain=plain,
        skip=options.guidance.skippable,
        **options.solver_options,
      )
    # Every value is checked: uint8 would make 0 of what is not a number.
    is_finite = jnp.isfinite(x).all()
    return (x if is_latent else to_uint8(x)), is_finite

  whole, split = replicated(mesh), batch_sharding(mesh)
  # Several processes each get a whole copy: one alone can read no other's.
  out = split if split.is_fully_addressable else whole
  run = jax.jit(
    generate,
    in_shardings=(whole, whole, whole, split, split),
    out_shardings=(out, whole),
  )

  def generate_checked(params, seed, index, labels):
    index, labels = (place(x, split) for x in (index, labels))
    samples, is_finite = run(params, recipe.guide_params, seed, index, labels)
    check_finite(bool(is_finite))
    return as_made(np.asarray(samples), config, codec)

  return generate_checked


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What decides a config's samples, beside the weights.

  Attributes:
    config: the whole config.
    options: its section `sampler`, sorted.
    model: its network, with the kernel that it samples with.
    guide_config, guide_model: of the network that guides; None without one.
    guide_params: that network's parameters; {} without one.
  """

  config: Mapping
  options: SamplerOptions
  model: nn.Module
  guide_config: Mapping | None
  guide_model: nn.Module | None
  guide_params: dict

  @classmethod
  def make(cls, model, config, mesh: Mesh, guide=None) -> "Recipe":
    """Probes the kernels; arguments as in `make_generator`."""
    options, side = SamplerOptions.from_config(config), _side(config)
    model = _with_kernel(model, side, mesh)
    if not options.guidance.has_guide:
      return cls(config, options, model, None, None, {})
    if guide is None:
      raise UserError(
        f"guide_scale={options.guidance.guide_scale} needs a guide: give"
        " --guide"
      )
    made = sampling.make_solver(options.solver, **options.solver_options)
    kinds.check_levels(guide.config["diffusion"], made.levels)
    guide_model = _with_kernel(make_model(guide.config), side, mesh)
    return cls(config, options, model, guide.config, guide_model, guide.params)

  def noise_and_keys(self, seed, index: jax.Array) -> tuple:
    """Initial noise [b, h, w, c] and keys [b] of samples of one seed."""
    streams = lambda i: jax.random.split(
      jax.random.fold_in(jax.random.key(seed, impl=PRNG), i)
    )
    noise_keys, keys = jnp.swapaxes(jax.vmap(streams)(index), 0, 1)
    shape = (_side(self.config), _side(self.config), self.model.channels)
    normal = lambda key: jax.random.normal(key, shape, jnp.float32)
    return jax.vmap(normal)(noise_keys), keys

  def denoisers(self, params, guide_params, labels: jax.Array) -> tuple:
    """(guided, without the unconditional half) of samples with labels [b]."""
    num_classes, rule = self.model.num_classes, self.options.guidance
    labels = labels if num_classes else None
    network = make_network(self.model, params, self.config)
    guide = self.guide_model and make_network(
      self.guide_model, guide_params, self.guide_config
    )
    without = dataclasses.replace(rule, scale=1.0)
    make = lambda rule: rule.denoiser(network, labels, num_classes, guide)
    return make(rule), make(without)


def as_made(samples: np.ndarray, config: Mapping, codec=None) -> np.ndarray:
  """What a solver ends with as images, or as latents without a codec.

  Args:
    samples: uint8 images, or scaled latents of a latent model.
    config: the whole config.
    codec: decodes latents.
  """
  if not kinds.is_latent(config):
    return samples
  samples = samples / np.float32(config["autoencoder"]["scaling_factor"])
  if codec is None:
    return samples
  images = np.asarray(codec.decode(samples))
  check_finite(np.isfinite(images).all())
  return to_uint8(images, "adm")


def _side(config: Mapping) -> int:
  return config["data"]["resolution"]


def make_model(config: Mapping) -> nn.Module:
  """The config's network, to sample with whatever kernel serves it here."""
  return models.make_model(config["model"]).clone(attention=AUTO)


def _with_kernel(model: nn.Module, side: int, mesh: Mesh) -> nn.Module:
  """The network with the kernel that `auto` stands for, if it passes a probe.

  A kernel with a name was probed by the run that draws its own grids; where it
  cannot run, the name is another machine's.
  """
  device, name = mesh.devices.flat[0], model.attention
  machine = device.platform, device.device_kind, model.dtype.name
  if name == AUTO or not kernels.runs_on(name, *machine):
    shapes = model.attention_shapes(side)
    name = kernels.choose(shapes, *machine)
    try:
      run = lambda: probe.probe_all(name, shapes, dtype=model.dtype.name)
      runtime.on_all_processes(run)
    except UserError as error:
      logging.warning("sampling with plain XLA: %s", error)
      name = PLAIN
  return model.clone(attention=name, per_device=per_device(mesh))


def sample_shape(config: Mapping, codec=None) -> tuple[int, int, int]:
  """[h, w, c] of what a generator of these makes."""
  side, channels = _side(config), config["model"]["channels"]
  if codec is None or not kinds.is_latent(config):
    return side, side, channels
  latents = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
  return jax.eval_shape(codec.decode_fn, codec.params, latents).shape[1:]


def check_finite(is_finite: bool) -> None:
  if not is_finite:
    raise UserError(
      "a sample has values that are not finite, and nothing of its batch was"
      " written: check the weights, the guidance scale and the solver's options"
    )


def make_grid_sampler(
  model: nn.Module, config: Mapping, mesh: Mesh, codec=None
) -> Callable[[dict], np.ndarray] | None:
  """The function (params) -> uint8 [n, h, w, c] of the grids in training.

  Always the same noise (seed 0) and the classes in turn, so that grids of
  different steps can be laid side by side. None where the latents of a model
  cannot be decoded, for lack of a codec.
  """
  if kinds.is_latent(config) and codec is None:
    return None
  generate = make_generator(model, config, mesh, codec)
  gather = jax.jit(lambda params: params, out_shardings=replicated(mesh))
  wanted = config["sampler"]["num_grid"]
  num = -(-wanted // mesh.size) * mesh.size  # whole rows on every device
  index = np.arange(num, dtype=np.uint32)
  labels = (index % max(model.num_classes, 1)).astype(np.int32)
  return lambda params: generate(gather(params), 0, index, labels)[:wanted]
