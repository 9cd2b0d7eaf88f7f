"""Variants of a config, as in --config=configs/X.py:debug,window=2.

A config file has a function `base` whose keyword arguments are its variants.
The annotation of each lists its values, the default first: a `Literal`, or bool
for a switch. Other configs call `base` with values, the command line with text.
"""

from collections.abc import Callable
import inspect
from typing import Any, Literal, get_args

from ml_collections import config_dict

Precision = Literal["paper", "bf16"]
Averages = Literal["one", "power"]
# What the paper's tables change in the image-space network.
TimeIn = Literal["tmsa", "rpb_time", "mlp_time", "separate", "plain"]
Embedding = Literal["positional", "fourier"]
# What is trained: the paper's own, or flow matching by published settings.
ImageObjective = Literal["edm", "flow", "sit", "jit"]
LatentObjective = Literal["adm", "flow", "sit", "jit"]


def resolve(
  base: Callable[..., config_dict.ConfigDict], arg: str | None
) -> config_dict.ConfigDict:
  """The config of an argument string; the variants become part of its name.

  Args:
    base: the function of the config file.
    arg: comma-separated `name=value`, or `name` alone for a switch.

  Raises:
    ValueError: an unknown variant or value, naming the valid ones.
  """
  items = [*filter(None, (arg or "").split(","))]
  config = base(**dict(_parse(item, variants(base)) for item in items))
  config.name = "-".join([config.name, *items])
  return config


def variants(base: Callable) -> dict[str, tuple]:
  """{variant: its values, the default first} of a config's `base`."""
  return {
    name: (False, True) if p.annotation is bool else get_args(p.annotation)
    for name, p in inspect.signature(base).parameters.items()
  }


def _parse(item: str, allowed: dict[str, tuple]) -> tuple[str, Any]:
  name, _, text = item.partition("=")
  if name not in allowed:
    raise ValueError(
      f"unknown variant {name!r} in the config's argument string: valid are"
      f" {_describe(allowed)}"
    )
  for value in allowed[name]:
    if str(value) == (text or "True"):
      return name, value
  raise ValueError(
    f"variant {item!r} in the config's argument string: use"
    f" {_describe({name: allowed[name]})}"
  )


def per_level(text: int | str) -> int | tuple[int, ...]:
  """Blocks per level, one number or one per level written as 1-2-2-2."""
  return text if isinstance(text, int) else tuple(map(int, text.split("-")))


# CHOICE: latents as with ADM's timesteps. Images: at 1, 10 and 1000 the digits
# had a Frechet distance of 0.42, 0.47 and 0.47 (digits.py:objective=flow, 750
# steps), and embedding=fourier has frequencies for levels of about 1.
LATENT_TIME_SCALE = 1000.0
IMAGE_TIME_SCALE = 1.0


def use_flow(
  config: config_dict.ConfigDict, setting: str, time_scale: float
) -> None:
  """Flow matching in place of a config's own diffusion, its sampler with it.

  Args:
    config: of images or latents, all else in it set.
    setting: sit (Ma et al. 2024), jit (Li and He 2025), or flow, which draws t
      as Esser et al. 2024 do (their rf/lognorm(0, 1)); of others, nothing is
      changed.
    time_scale: the network is told time_scale t.
  """
  if setting not in ("flow", "sit", "jit"):
    return
  old = config.diffusion
  new = config.diffusion = config_dict.ConfigDict()
  new.kind = "flow"  # straight paths from data to noise, t the share of noise
  new.prediction = "v"  # of the network: x, eps or v
  new.loss = "v"  # what the error is taken in, likewise
  new.time = "logit_normal"  # or uniform: how training draws t
  new.t_mean = 0.0  # of the logit of t
  new.t_std = 1.0  # its standard deviation
  new.shift = 1.0  # above 1 more noise, for more pixels; 1 is off
  new.clamp = 0.0  # least divisor in the loss; 0 is none
  new.time_scale = time_scale  # the network is told time_scale t
  if "augment_prob" in old:
    new.augment_prob = old.augment_prob
  new.label_drop_prob = old.label_drop_prob
  if setting == "sit":
    new.time = "uniform"
  if setting == "jit":
    new.prediction = "x"
    new.t_mean = 0.8  # JiT's -0.8, whose t is our 1 - t
    new.t_std = 0.8
    new.clamp = 0.05
  if "learn_sigma" in config.model:
    config.model.learn_sigma = False  # a flow has no variance
  sampler = config.sampler
  sampler.solver = "heun"  # heun, euler, euler_maruyama, dpmpp_2m or unipc
  sampler.steps = min(sampler.steps, 50)  # 2 network evaluations each, less 1
  if sampler.guidance_scale != 1:
    sampler.guidance_scale = 1.5  # as SiT
  if "guidance_schedule" in sampler:
    sampler.guidance_schedule = "constant"
    sampler.guidance_channels = 0


def add_power_averages(config: config_dict.ConfigDict) -> None:
  """Two averages from which any width can be made after training.

  The widths are those that Karras et al. 2024 track; 32 snapshots reach the
  profile of 0.08 within 0.1 %, of 0.15 within 0.3 % and of 0.03 within 2 %.
  """
  for name, width in (("p05", 0.05), ("p10", 0.10)):
    config.ema[name] = config_dict.ConfigDict()
    config.ema[name].kind = "power"  # of the share of the run that is done
    config.ema[name].sigma_rel = width  # width as a share of the run
  config.snapshot_every_steps = max(config.total_steps // 32, 1)


def _describe(allowed: dict[str, tuple]) -> str:
  return ", ".join(
    name if values == (False, True) else f"{name}={'|'.join(map(str, values))}"
    for name, values in allowed.items()
  )
