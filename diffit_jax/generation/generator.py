"""A compiled function from (weights, sample indices, labels) to images.

Sample i depends on (seed, i) alone: fold_in(key(seed), i) is split into one key
for its initial noise and one for the draws of a stochastic solver. Batch
size, device count and order change rounding at most.
"""

import ast
from collections.abc import Callable, Mapping
import dataclasses
import inspect

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from diffit_jax import ranges, sampling
from diffit_jax.diffusion import guidance, precond
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.parallel.mesh import batch_sharding, place, replicated
from diffit_jax.pictures import to_uint8


def _is_edm(config: Mapping) -> bool:
  return config["diffusion"]["kind"] == "edm"


def make_network(
  model: nn.Module, params, config: Mapping
) -> Callable[..., jax.Array]:
  """What `make_denoiser` makes of a model with its parameters."""
  apply = lambda x, level, labels: model.apply(
    {"params": params}, x, level, labels
  )
  return make_denoiser(apply, config)


def make_denoiser(
  apply: Callable[..., jax.Array], config: Mapping
) -> Callable[..., jax.Array]:
  """The function (x, level, labels) that the config's solvers are made for.

  Args:
    apply: the raw network, (x, c_noise or t, labels) -> its output.
    config: the whole config.

  Returns:
    For "edm" the denoiser (x, sigma [b]) -> D [b, h, w, c]; for "adm" the raw
    prediction (x, t [b]) -> [b, h, w, c or 2c].
  """
  if config["diffusion"]["kind"] == "adm":
    return apply
  process = precond.make(config["diffusion"])

  def denoise(x, sigma, labels):
    network = lambda x_in, c_noise: apply(x_in, c_noise, labels)
    return process.denoise(network, x, sigma)

  return denoise


def make_generator(
  model: nn.Module, config: Mapping, mesh: Mesh, codec=None
) -> Callable[..., np.ndarray]:
  """The function (params, seed, index [b], labels [b]) -> what the model makes.

  Args:
    model: of `config.model`.
    config: the whole config; data, diffusion, sampler and matmul_precision are
      read.
    mesh: the batch is split over all of it, weights are replicated.
    codec: decodes the latents of a latent model.

  Returns:
    A function with uint8 [b, h, w, c] images, or, of a latent model without a
    codec, float32 latents as the VAE gives them (unscaled).
  """
  options = SamplerOptions.from_config(config)
  model = model.clone(attention="xla")  # cuDNN's is probed for training only
  is_edm = _is_edm(config)
  side, channels = config["data"]["resolution"], model.channels

  def generate(params, seed, index, labels):
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
      denoiser = lambda cfg: guidance.guided(
        network, labels, model.num_classes, **cfg
      )
      x = sampling.sample(
        denoiser(options.cfg),
        options.solver,
        noise,
        keys=keys,
        plain=denoiser({"scale": 1}),
        skip=options.skip,
        **options.solver_options,
      )
    # Every value is checked: uint8 would make 0 of what is not a number.
    is_finite = jnp.isfinite(x).all()
    return (to_uint8(x) if is_edm else x), is_finite

  whole, split = replicated(mesh), batch_sharding(mesh)
  # Several processes each get a whole copy: one alone can read no other's.
  out = split if split.is_fully_addressable else whole
  run = jax.jit(
    generate,
    in_shardings=(whole, whole, split, split),
    out_shardings=(out, whole),
  )

  def generate_checked(params, seed, index, labels):
    index, labels = (place(x, split) for x in (index, labels))
    samples, is_finite = run(params, seed, index, labels)
    _check_finite(bool(is_finite))
    samples = np.asarray(samples)
    if is_edm:
      return samples
    samples = samples / np.float32(config["autoencoder"]["scaling_factor"])
    if codec is None:
      return samples
    images = np.asarray(codec.decode(samples))
    _check_finite(np.isfinite(images).all())
    return to_uint8(images, "adm")

  return generate_checked


def sample_shape(config: Mapping, codec=None) -> tuple[int, int, int]:
  """[h, w, c] of what a generator of these makes."""
  side, channels = config["data"]["resolution"], config["model"]["channels"]
  if codec is None or config["diffusion"]["kind"] == "edm":
    return side, side, channels
  latents = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
  return jax.eval_shape(codec.decode_fn, codec.params, latents).shape[1:]


def _check_finite(is_finite: bool) -> None:
  if not is_finite:
    raise UserError(
      "a sample has values that are not finite, and nothing of its batch was"
      " written: check the weights, the guidance scale and the solver's options"
    )


def _parse_options(text: str) -> dict:
  """{"eta": 1, "spacing": "trailing"} from "eta=1,spacing=trailing"."""
  options = {}
  for item in filter(None, text.split(",")):
    name, is_assignment, value = item.partition("=")
    if not is_assignment:
      raise UserError(
        f"solver_options={text!r}: write name=value, separated by commas"
      )
    try:
      options[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      options[name] = value
  return options


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
  """`config.sampler`, sorted by who it is for.

  Attributes:
    solver: name of the solver.
    solver_options: its arguments, steps included.
    cfg: guidance, as `guidance.guided` takes it.
    skip: levels -> where the unconditional half may be left out.
  """

  solver: str
  solver_options: dict
  cfg: dict
  skip: Callable[[np.ndarray], np.ndarray]

  @classmethod
  def from_config(cls, config: Mapping) -> "SamplerOptions":
    """Sorts the fields, and refuses those that cannot work."""
    ranges.check(config["sampler"], "sampler")
    fields = dict(config["sampler"])
    fields.pop("num_grid", None)
    cfg = {
      name.removeprefix("guidance_"): fields.pop(name)
      for name in list(fields)
      if name.startswith("guidance_")
    }
    tolerance = cfg.pop("tolerance", 0.0)
    # The noise channels alone: a learned variance is never guided.
    channels = cfg.get("channels") or config["model"]["channels"]
    if not 1 <= channels <= config["model"]["channels"]:
      raise UserError(
        f"guidance_channels={channels} must be from 1 to the"
        f" {config['model']['channels']} channels, or 0 for all of them"
      )
    cfg["channels"] = channels
    known = inspect.signature(guidance.apply_cfg).parameters
    for name in cfg:
      if name not in known:
        raise UserError(f"there is no sampler field guidance_{name}")
    if cfg.get("schedule") == "power_cosine" and _is_edm(config):
      raise UserError(
        "guidance_schedule='power_cosine' goes by the timesteps of"
        " diffusion.kind='adm', and this model has noise levels: use constant"
      )
    if "interval" in cfg:
      cfg["interval"] = tuple(cfg["interval"]) or None
    solver = fields.pop("solver")
    fields |= _parse_options(fields.pop("solver_options", ""))
    check_guidance(config, cfg["scale"])
    sampling.num_evaluations(solver, **fields)  # refuses unknown options now
    if (solver == "edm_heun") != _is_edm(config):
      raise UserError(
        f"solver {solver!r} is not for a model of"
        f" diffusion.kind={config['diffusion']['kind']!r}: use edm_heun for"
        " edm, and ddpm, ddim, dpmpp_2m or unipc for adm"
      )
    rule = {k: v for k, v in cfg.items() if k != "channels"}
    skip = lambda levels: guidance.skippable(
      levels, tolerance=tolerance, **rule
    )
    return cls(solver, fields, cfg, skip)

  def num_evaluations(self) -> tuple[int, int]:
    """(evaluations with the label, those of them without the other half)."""
    name, options = self.solver, self.solver_options
    return (
      sampling.num_evaluations(name, **options),
      sampling.num_skipped(name, skip=self.skip, **options),
    )


def make_grid_sampler(
  model: nn.Module, config: Mapping, mesh: Mesh, codec=None
) -> Callable[[dict], np.ndarray] | None:
  """The function (params) -> uint8 [n, h, w, c] of the grids in training.

  Always the same noise (seed 0) and the classes in turn, so that grids of
  different steps can be laid side by side. None where the latents of a model
  cannot be decoded, for lack of a codec.
  """
  if config["diffusion"]["kind"] == "adm" and codec is None:
    return None
  generate = make_generator(model, config, mesh, codec)
  gather = jax.jit(lambda params: params, out_shardings=replicated(mesh))
  wanted = config["sampler"]["num_grid"]
  num = -(-wanted // mesh.size) * mesh.size  # whole rows on every device
  index = np.arange(num, dtype=np.uint32)
  labels = (index % max(model.num_classes, 1)).astype(np.int32)
  return lambda params: generate(gather(params), 0, index, labels)[:wanted]


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
  if not classes or max(classes) > num_classes or min(classes) < 0:
    raise UserError(
      f"labels={labels} go beyond the model's classes 0..{num_classes - 1}, and"
      f" {num_classes} for no class"
    )
  return np.asarray(classes, np.int32)[np.asarray(index) % len(classes)]
