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
  options = SamplerOptions.from_config(config)
  model = _with_kernel(model, config["data"]["resolution"], mesh)
  is_latent = kinds.is_latent(config)
  side, channels = config["data"]["resolution"], model.channels
  if options.guidance.has_guide and guide is None:
    raise UserError(
      f"guide_scale={options.guidance.guide_scale} needs a guide: give --guide"
    )
  guiding = guide and _with_kernel(make_model(guide.config), side, mesh)

  def generate(params, guide_params, seed, index, labels):
    streams = lambda i: jax.random.split(
      jax.random.fold_in(jax.random.key(seed, impl=PRNG), i)
    )
    noise_keys, keys = jnp.swapaxes(jax.vmap(streams)(index), 0, 1)
    noise = jax.vmap(
      lambda key: jax.random.normal(key, (side, side, channels), jnp.float32)
    )(noise_keys)
    labels = labels if model.num_classes else None
    with jax.default_matmul_precision(config["matmul_precision"]):
      network = make_network(model, params, config)
      guide_network = guide and make_network(
        guiding, guide_params, guide.config
      )
      denoiser = lambda rule: rule.denoiser(
        network, labels, model.num_classes, guide_network
      )
      x = sampling.sample(
        denoiser(options.guidance),
        options.solver,
        noise,
        keys=keys,
        plain=denoiser(dataclasses.replace(options.guidance, scale=1.0)),
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

  guide_params = guide.params if options.guidance.has_guide else {}

  def generate_checked(params, seed, index, labels):
    index, labels = (place(x, split) for x in (index, labels))
    samples, is_finite = run(params, guide_params, seed, index, labels)
    _check_finite(bool(is_finite))
    samples = np.asarray(samples)
    if not is_latent:
      return samples
    samples = samples / np.float32(config["autoencoder"]["scaling_factor"])
    if codec is None:
      return samples
    images = np.asarray(codec.decode(samples))
    _check_finite(np.isfinite(images).all())
    return to_uint8(images, "adm")

  return generate_checked


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
  side, channels = config["data"]["resolution"], config["model"]["channels"]
  if codec is None or not kinds.is_latent(config):
    return side, side, channels
  latents = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
  return jax.eval_shape(codec.decode_fn, codec.params, latents).shape[1:]


def _check_finite(is_finite: bool) -> None:
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
