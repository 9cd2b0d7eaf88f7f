"""The flags that say which network samples, and how; for several commands."""

import dataclasses

from absl import flags

from diffit_jax import config_files, ranges
from diffit_jax.cli import define_path
from diffit_jax.errors import UserError
from diffit_jax.sampling import by_process

flags.disclaim_key_flags()  # --help lists them with the entry point's own


@dataclasses.dataclass(frozen=True)
class WeightsFlags:
  """The flags that say which network a command takes: a run's or a file's."""

  workdir: flags.FlagHolder
  checkpoint: flags.FlagHolder
  config: flags.FlagHolder
  step: flags.FlagHolder

  @property
  def sources(self) -> dict[str, str | None]:
    """The flags of which one must be given; see `require_one_of`."""
    return {"workdir": self.workdir.value, "checkpoint": self.checkpoint.value}

  def load(self, mesh, ema: str | None):
    """The weights, on all devices of the mesh; see `generation.weights`."""
    from diffit_jax.generation import weights

    config = self.config.value and config_files.required(self.config)
    if not self.workdir.value:
      if self.step.value is not None:
        raise UserError("--step goes with --workdir: a file has one step")
      return weights.from_file(self.checkpoint.value, mesh, ema, config)
    if config is not None:
      raise UserError("--config goes with --checkpoint: a workdir has its own")
    return weights.from_workdir(
      self.workdir.value, mesh, ema, self.step.value
    )


def define_weights_flags() -> WeightsFlags:
  """Defines the flags of `WeightsFlags`, once per program."""
  return WeightsFlags(
    workdir=define_path("workdir", "Folder of a training run."),
    checkpoint=define_path(
      "checkpoint",
      "A .safetensors file, exported or released, or the address of one on the"
      " Hugging Face Hub: hf://owner/name/file.safetensors[@revision].",
    ),
    config=config_files.define_flag(
      "Config of a --checkpoint that has none of its own, as released weights."
    ),
    step=flags.DEFINE_integer(
      "step", None, "Checkpoint of the workdir. Default: the newest.", 0
    ),
  )


# Flags that replace the config's sampler fields of the same name.
_SAMPLER_FIELDS = (
  "solver",
  "steps",
  "solver_options",
  "guidance_scale",
  "guidance_schedule",
  "guidance_power",
  "guidance_channels",
  "guidance_interval",
  "guidance_tolerance",
  "guide_scale",
)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
  """The sampling flags that all entry points share."""

  labels: flags.FlagHolder
  seed: flags.FlagHolder
  num: flags.FlagHolder
  ema: flags.FlagHolder
  vae: flags.FlagHolder
  guide: flags.FlagHolder
  guide_ema: flags.FlagHolder
  guide_step: flags.FlagHolder

  def of_networks(self) -> list:
    """The flags that mean nothing for images that are there already."""
    own = [self.ema, self.vae, self.guide, self.guide_ema, self.guide_step]
    return [*own, *(flags.FLAGS[name] for name in _SAMPLER_FIELDS)]

  def open(self, source: WeightsFlags, mesh, swept: str | None = None):
    """(weights, with these flags in their config; the autoencoder or None).

    Args:
      source: which weights.
      mesh: the devices.
      swept: field of the sampler that is yet to be set.
    """
    from diffit_jax.autoencoder.codec import make_codec
    from diffit_jax.generation import weights

    loaded = source.load(mesh, self.ema.value)
    self.apply(loaded.config.sampler)
    loaded = self._with_guide(loaded, mesh, swept)
    codec = make_codec(loaded.config, self.vae.value)
    weights.warn_of_another_vae(loaded.config, codec)
    return loaded, codec

  def _with_guide(self, loaded, mesh, swept: str | None):
    """The weights, with those of --guide; refuses flags without their match."""
    from diffit_jax.generation import weights

    is_scaled = "guide_scale" in (swept, *loaded.config.sampler)
    if not self.guide.value:
      for flag in (self.guide_ema, self.guide_step):
        if flag.value is not None:
          raise UserError(f"--{flag.name} goes with --guide")
      if is_scaled:
        raise UserError("guide_scale goes with --guide: give both or neither")
      return loaded
    if not is_scaled:
      raise UserError("--guide goes with --guide_scale, such as 2: 1 is off")
    found = weights.load_guide(
      self.guide.value,
      mesh,
      loaded,
      ema=self.guide_ema.value,
      step=self.guide_step.value,
    )
    return dataclasses.replace(loaded, guide=found)

  def apply(self, sampler) -> None:
    """Writes the flags that were given over the config's sampler section."""
    with sampler.unlocked():
      for name in _SAMPLER_FIELDS:
        value = flags.FLAGS[name].value
        if value is None:
          continue
        if name == "guidance_interval":
          value = _interval(value)
        ranges.check({name: value}, "sampler", "--")
        sampler[name] = value


def _interval(text: list[str]) -> tuple[float, ...]:
  try:
    return tuple(float(end) for end in text)
  except ValueError as error:
    raise UserError(
      f"--guidance_interval={','.join(text)}: write two noise levels as 100,600"
    ) from error


def define_sampling_flags(
  num: int | None = 64, num_help: str = "Number of images."
) -> SamplingFlags:
  """Defines the flags of `SamplingFlags`, once per program.

  Args:
    num: default of --num.
    num_help: help text of --num.
  """
  flags.DEFINE_string("solver", None, f"{by_process()}. Default: the config's.")
  flags.DEFINE_integer("steps", None, "Default: the config's.")
  flags.DEFINE_string(
    "solver_options",
    None,
    "Options of the solver, such as eta=1,spacing=trailing for ddim or"
    " S_churn=40 for edm_heun. Default: the config's.",
  )
  flags.DEFINE_float("guidance_scale", None, "1 is off. Default: the config's.")
  flags.DEFINE_enum(
    "guidance_schedule",
    None,
    ["constant", "power_cosine"],
    "Default: the config's, or constant.",
  )
  flags.DEFINE_float(
    "guidance_power", None, "Power of the power-cosine schedule."
  )
  flags.DEFINE_integer(
    "guidance_channels", None, "Number of guided channels; 0 for all.", 0
  )
  flags.DEFINE_list(
    "guidance_interval",
    None,
    "low,high: noise levels (timesteps, or sigma) outside of which there is no"
    " guidance.",
  )
  flags.DEFINE_float(
    "guidance_tolerance",
    None,
    "Where the scale is within this of 1, the network runs without its"
    " unconditional half. Default: the config's, or 0.",
    0.0,
  )
  flags.DEFINE_float(
    "guide_scale",
    None,
    "Weight of autoguidance, away from what --guide predicts; 1 is off.",
  )
  return SamplingFlags(
    labels=flags.DEFINE_string(
      "labels",
      "random",
      "Classes such as 3, 0,1,2 or 0-9, dealt out in turn, or random. The"
      " number of classes stands for no class.",
    ),
    seed=flags.DEFINE_integer(
      "seed", 0, "Seed of all random draws.", 0, 2**32 - 1
    ),
    num=flags.DEFINE_integer("num", num, num_help, 1, 10**9),
    ema=flags.DEFINE_string(
      "ema",
      None,
      "Which average of the weights; none for the raw parameters; a relative"
      " width such as 0.08, made from the run's snapshots. Default: the run's"
      " first.",
    ),
    vae=define_path(
      "vae",
      "Diffusers folder of the SD VAE that decodes a latent model's samples.",
    ),
    guide=define_path(
      "guide",
      "Workdir or .safetensors file, also hf://..., of a worse network of the"
      " same kind, such as a smaller one or an earlier step, for autoguidance.",
    ),
    guide_ema=flags.DEFINE_string(
      "guide_ema", None, "As --ema, of the guide. Default: its own first."
    ),
    guide_step=flags.DEFINE_integer(
      "guide_step",
      None,
      "Checkpoint of the guide's workdir. Default: the newest.",
      0,
    ),
  )
