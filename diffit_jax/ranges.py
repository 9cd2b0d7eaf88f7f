"""The range of every number in a config, in one table.

`check` refuses a config before anything is made of it. Upper ends are where a
number is surely a slip of the keyboard, or no longer fits where it is kept;
0 is "off" wherever a config's comment says so. A field without a row, of a
user's own config, is not looked at; tests see to it that ours all have one.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import fnmatch
import math
import numbers

from diffit_jax.errors import UserError

_STEPS = 2**31 - 1  # the step is an int32
_MANY = 10**6
_IMAGES = 1e12


@dataclasses.dataclass(frozen=True)
class Range:
  """The numbers that a field may have.

  Attributes:
    low: least number.
    high: largest number.
    whole: whether only whole numbers will do.
    above: whether `low` itself is left out.
    below: whether `high` itself is left out.
    other: a value outside of it that is allowed, too; "" for none.
    note: what to know of it.
  """

  low: float
  high: float
  whole: bool = False
  above: bool = False
  below: bool = False
  other: object = ""
  note: str = ""

  def fault(self, value: object) -> str | None:
    """What the value must be, or None if it is that."""
    if self.other != "" and value == self.other:
      return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
      return f"must be a number, {self}"
    if math.isnan(value) or math.isinf(value) and not math.isinf(self.high):
      return f"must be finite, {self}"
    if self.whole and value != int(value):
      return f"must be a whole number, {self}"
    is_low = value <= self.low if self.above else value < self.low
    is_high = value >= self.high if self.below else value > self.high
    return f"must be {self}" if is_low or is_high else None

  def __str__(self) -> str:
    low = f"{'above' if self.above else 'at least'} {_text(self.low)}"
    high = f"{'below' if self.below else 'at most'} {_text(self.high)}"
    text = low if math.isinf(self.high) else f"{low} and {high}"
    text += "" if self.other == "" else f", or {self.other}"
    return text + (f"; {self.note}" if self.note else "")


def _text(number: float) -> str:
  return f"{number:,}" if isinstance(number, int) else f"{number:.4g}"


def _count(low: int = 1, high: int = _MANY, **more) -> Range:
  return Range(low, high, whole=True, **more)


_EVERY = _count(0, _STEPS, note="0 is off")
_SHARE = Range(0, 1, below=True)  # of what would otherwise be all gone

RANGES: dict[str, Range] = {
  "seed": _count(0, 2**32 - 1),
  "batch_size": _count(),
  "total_steps": _count(1, _STEPS),
  "num_microbatches": _count(),
  "num_threads": _count(1, 1024),
  "log_every_steps": _count(1, _STEPS),
  "save_every_steps": _count(1, _STEPS),
  "sample_every_steps": _EVERY,
  "keep_every_steps": _EVERY,
  "evaluate_every_steps": _EVERY,
  "snapshot_every_steps": _EVERY,
  "keep_checkpoints": _count(),
  "watchdog_seconds": Range(0, 1e9, note="0 is off"),
  "evaluation.num": _count(2, 10**9),
  "data.resolution": _count(1, 2**14),
  "data.num_classes": _count(0),
  "autoencoder.down_factor": _count(1, 1024),
  "autoencoder.scaling_factor": Range(0, 1e6, above=True),
  # The networks; null classes and augmentation labels may be none.
  "model.input_size": _count(1, 2**14),
  "model.patch_size": _count(1, 2**14),
  "model.channels": _count(),
  "model.base_channels": _count(),
  "model.channel_mult[*]": _count(),
  "model.num_blocks": _count(1, 1000),
  "model.num_blocks[*]": _count(1, 1000),
  "model.window_size": _count(1, 2**14, other=None),
  "model.attention_sides[*]": _count(1, 2**14),
  "model.head_dim": _count(),
  "model.hidden_dim": _count(),
  "model.depth": _count(1, 1000),
  "model.num_heads": _count(),
  "model.time_dim": _count(),
  "model.frequency_dim": _count(2),
  "model.mlp_ratio": Range(0, 1000, above=True),
  "model.num_classes": _count(0),
  "model.augment_dim": _count(0),
  "model.dropout": _SHARE,
  "model.vit_dim": _count(),
  "model.vit_depth": _count(1, 1000),
  "model.vit_heads": _count(),
  "diffusion.sigma_data": Range(0, 1e6, above=True),
  "diffusion.P_mean": Range(-20, 20),  # of ln sigma
  "diffusion.P_std": Range(0, 20),
  "diffusion.augment_prob": Range(0, 1),
  "diffusion.label_drop_prob": _SHARE,
  "diffusion.t_mean": Range(-20, 20),  # of the logit of t
  "diffusion.t_std": Range(0, 20),
  "diffusion.shift": Range(0, 1000, above=True),
  "diffusion.clamp": Range(0, 1, below=True, note="1 cuts the whole path"),
  "diffusion.time_scale": Range(0, 1e6, above=True),
  "diffusion.num_steps": _count(
    1000, 1000, note="samplers and guidance count in 1000 steps"
  ),
  "optimizer.learning_rate": Range(0, 100),
  "optimizer.rampup_images": Range(0, _IMAGES, note="0 is no ramp"),
  "optimizer.b1": _SHARE,
  "optimizer.b2": _SHARE,
  "optimizer.eps": Range(0, 1, above=True),
  "optimizer.weight_decay": Range(0, 1000),
  "optimizer.clip_norm": Range(0, 1e12, note="0 is off"),
  "ema.*.halflife_images": Range(0, _IMAGES),
  "ema.*.rampup_ratio": Range(0, 1e6),
  "ema.*.decay": _SHARE,
  "ema.*.sigma_rel": Range(
    0, 12**-0.5, above=True, note="the latter is the plain mean of all steps"
  ),
  "mesh.data": _count(other=-1),
  "mesh.fsdp": _count(other=-1),
  "mesh.num_devices": _count(0),
  "sampler.steps": _count(1, 100_000),
  "sampler.num_grid": _count(
    1, 100_000, note="no grids are sample_every_steps=0"
  ),
  "sampler.guidance_scale": Range(-1000, 1000),
  "sampler.guidance_power": Range(0, 1000),
  "sampler.guidance_channels": _count(0),
  "sampler.guidance_interval[*]": Range(-math.inf, math.inf),
  "sampler.guidance_tolerance": Range(0, 1000),
  "sampler.guide_scale": Range(-1000, 1000),
}


def rows(path: str) -> list[str]:
  """The patterns in the table that a path matches."""
  found = [path] if path in RANGES else []
  literal = lambda pattern: pattern.replace("[*]", "[[]*]")
  return found + [
    pattern
    for pattern in RANGES
    if "*" in pattern and fnmatch.fnmatchcase(path, literal(pattern))
  ]


def check(fields: Mapping, section: str = "", prefix: str = "") -> None:
  """Refuses numbers out of their ranges.

  Args:
    fields: a config, or some fields of one section.
    section: its name, as "sampler".
    prefix: what the message puts before a field's name in place of "config."
      and the section.

  Raises:
    UserError: names the field, its value and its range.
  """
  for path, value in leaves(fields, section):
    name = f"config.{path}"
    if prefix:
      name = prefix + path.removeprefix(f"{section}.")
    check_value(path, value, name)


def check_value(path: str, value: object, name: str) -> None:
  """Refuses a number out of the range of `path`, calling it `name`."""
  for pattern in rows(path):
    fault = RANGES[pattern].fault(value)
    if fault:
      raise UserError(f"{name}={value} {fault}")


def leaves(fields: Mapping, section: str = "") -> Iterator[tuple[str, object]]:
  """(path, value) of every leaf; of sequences, path[i] and each element."""
  for name, value in fields.items():
    path = f"{section}.{name}" if section else name
    if isinstance(value, Mapping) or hasattr(value, "items"):
      yield from leaves(value, path)
    elif isinstance(value, (list, tuple)):
      yield from ((f"{path}[{i}]", each) for i, each in enumerate(value))
    else:
      yield path, value
