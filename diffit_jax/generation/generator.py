"""A compiled function from (weights, sample indices, labels) to uint8 images.

Sample i depends on (seed, i) alone: fold_in(key(seed), i) is split into one key
for its initial noise and one for the draws of a stochastic solver. Batch
size, device count and order change rounding at most.
"""

from collections.abc import Callable, Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from diffit_jax import sampling
from diffit_jax.diffusion import edm, guidance
from diffit_jax.errors import UserError
from diffit_jax.parallel.mesh import batch_sharding, replicated
from diffit_jax.sampling.images import to_uint8


def make_denoiser(
  model: nn.Module,
  params,
  diffusion: Mapping,
  labels: jax.Array | None,
  guidance_scale: float,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The EDM denoiser (x, sigma[b]) -> x0, guidance applied.

  Args:
    model: the raw network.
    params: its parameters.
    diffusion: the config's section, for sigma_data.
    labels: [b] classes; None for an unconditional model.
    guidance_scale: 1 runs the conditional network alone.
  """

  def denoise(x, sigma, labels):
    network = lambda x_in, c_noise: model.apply(
      {"params": params}, x_in, c_noise, labels
    )
    return edm.denoise(network, x, sigma, sigma_data=diffusion["sigma_data"])

  return guidance.guided(
    denoise, labels, model.num_classes, scale=guidance_scale
  )


def make_generator(model: nn.Module, config: Mapping, mesh: Mesh) -> Callable:
  """Jits (params, seed, index [b], labels [b]) -> uint8 [b, h, w, c].

  Args:
    model: of `config.model`.
    config: the whole config; data, diffusion, sampler and matmul_precision are
      read.
    mesh: the batch is split over all of it, weights are replicated.
  """
  sampler = dict(config["sampler"])
  sampler.pop("num_grid", None)
  solver, scale = sampler.pop("solver"), sampler.pop("guidance_scale")
  check_guidance(config, scale)
  sampling.num_evaluations(solver, **sampler)  # refuses unknown options now
  side, channels = config["data"]["resolution"], model.channels

  def generate(params, seed, index, labels):
    streams = lambda i: jax.random.split(
      jax.random.fold_in(jax.random.key(seed), i)
    )
    noise_keys, keys = jnp.swapaxes(jax.vmap(streams)(index), 0, 1)
    noise = jax.vmap(
      lambda key: jax.random.normal(key, (side, side, channels))
    )(noise_keys)
    labels = labels if model.num_classes else None
    with jax.default_matmul_precision(config["matmul_precision"]):
      denoiser = make_denoiser(
        model, params, config["diffusion"], labels, scale
      )
      x = sampling.sample(denoiser, solver, noise, keys=keys, **sampler)
    return to_uint8(x)

  whole, split = replicated(mesh), batch_sharding(mesh)
  return jax.jit(
    generate,
    in_shardings=(whole, whole, split, split),
    out_shardings=split,
  )


def make_grid_sampler(
  model: nn.Module, config: Mapping, mesh: Mesh
) -> Callable[[dict], np.ndarray]:
  """The function (params) -> uint8 [n, h, w, c] of the grids in training.

  Always the same noise (seed 0) and the classes in turn, so that grids of
  different steps can be laid side by side.
  """
  generate = make_generator(model, config, mesh)
  wanted = config["sampler"]["num_grid"]
  num = -(-wanted // mesh.size) * mesh.size  # whole rows on every device
  index = np.arange(num, dtype=np.uint32)
  labels = (index % max(model.num_classes, 1)).astype(np.int32)
  return lambda params: np.asarray(generate(params, 0, index, labels))[:wanted]


def check_guidance(config: Mapping, scale: float) -> None:
  """Refuses guidance where the model cannot give it."""
  if scale == 1:
    return
  if not config["model"]["num_classes"]:
    raise UserError(
      f"guidance_scale={scale} needs a class-conditional model, and this one"
      " is unconditional: use guidance_scale=1"
    )
  if not config["diffusion"]["label_drop_prob"]:
    raise UserError(
      f"guidance_scale={scale} needs a model trained with label dropout, and"
      " diffusion.label_drop_prob is 0: use guidance_scale=1"
    )


def choose_labels(
  index: np.ndarray, seed: int, num_classes: int, labels: str = "random"
) -> np.ndarray:
  """The class of each sample, a function of (seed, sample index).

  Args:
    index: [n] sample indices.
    seed: of the run of the sampler.
    num_classes: 0 for an unconditional model.
    labels: "random", uniform and independent per sample, or classes such as
      "3", "0,1,2" or "0-9", dealt out in turn.

  Returns:
    [n] int32; all 0 for an unconditional model.

  Raises:
    UserError: labels for an unconditional model, or out of range.
  """
  if labels == "random":
    draw = lambda i: np.random.Generator(
      np.random.Philox(key=[seed, int(i)])
    ).integers(max(num_classes, 1))
    return np.array([draw(i) for i in index], np.int32)
  if not num_classes:
    raise UserError(
      f"labels={labels} were asked of an unconditional model: leave them out"
    )
  try:
    classes = []
    for part in labels.split(","):
      first, _, last = part.partition("-")
      classes.extend(range(int(first), int(last or first) + 1))
  except ValueError as error:
    raise UserError(
      f"labels={labels!r}: write classes as 3, 0,1,2 or 0-9, or random"
    ) from error
  if not classes or max(classes) >= num_classes or min(classes) < 0:
    raise UserError(
      f"labels={labels} go beyond the model's classes 0..{num_classes - 1}"
    )
  return np.asarray(classes, np.int32)[np.asarray(index) % len(classes)]
