"""Every number of every config has one range, and is refused outside of it."""

import collections
import importlib
import math
import pathlib
import types

import pytest

from configs import common, digits
from diffit_jax import models, ranges, sampling_flags
from diffit_jax.errors import UserError
from diffit_jax.evaluation import sweep
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.models import NETWORKS
from diffit_jax.training import checks

FOLDER = pathlib.Path(common.__file__).parent
NOT_CONFIGS = ("__init__", "common", "experiments")
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in NOT_CONFIGS)


def all_configs(name):
  """The config by itself, and with each of its variants' values."""
  module = importlib.import_module(f"configs.{name}")
  args = [
    variant if value is True else f"{variant}={value}"
    for variant, values in common.variants(module.base).items()
    for value in values[1:]
  ]
  return {arg: module.get_config(arg) for arg in ("", *args)}


def is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_every_config_has_one_range(name):
  for arg, config in all_configs(name).items():
    ranges.check(config)
    for path, value in ranges.leaves(config):
      expected = 1 if is_number(value) else 0
      assert len(ranges.rows(path)) == expected, f"{name}:{arg} {path}={value}"


def test_every_number_of_every_network_has_one_range():
  for network in map(models.network_class, NETWORKS["edm"] | NETWORKS["adm"]):
    for field in network.__dataclass_fields__.values():
      if is_number(field.default):
        assert len(ranges.rows(f"model.{field.name}")) == 1, field.name


def outside(allowed):
  """Numbers just outside of the two ends, and what is no number."""
  step = lambda x, up: x + (1 if up else -1)
  if not allowed.whole:
    step = lambda x, up: math.nextafter(x, math.inf if up else -math.inf)
  if math.isinf(allowed.high):
    return [math.nan]
  low = allowed.low if allowed.above else step(allowed.low, False)
  high = allowed.high if allowed.below else step(allowed.high, True)
  half = [allowed.low + 0.5] if allowed.whole else []
  numbers = [low, high, *half, math.nan, math.inf, -math.inf]
  return [x for x in numbers if x != allowed.other]


def inside(allowed):
  if math.isinf(allowed.high):
    return [-math.inf, 0.0, math.inf]
  low = math.nextafter(0, 1) if allowed.above else allowed.low
  high = math.nextafter(1, 0) if allowed.below else allowed.high
  return [low, high, *([] if allowed.other == "" else [allowed.other])]


@pytest.mark.parametrize("pattern", ranges.RANGES)
def test_the_ends_of_each_range(pattern):
  path = pattern.replace("[*]", "[0]").replace("*", "name")
  allowed = ranges.RANGES[pattern]
  for value in inside(allowed):
    ranges.check_value(path, value, path)
  for value in [*outside(allowed), "12"]:
    with pytest.raises(UserError) as error:
      ranges.check_value(path, value, f"config.{path}")
    message = str(error.value)
    assert message.startswith(f"config.{path}={value} must be "), message
    assert message.endswith(str(allowed)), message


def test_what_stood_in_the_reports():
  for path, value, rest in (
    (
      "sample_every_steps",
      -1,
      "at least 0 and at most 2,147,483,647; 0 is off",
    ),
    ("optimizer.learning_rate", -1.0, "at least 0 and at most 100"),
    ("optimizer.learning_rate", math.nan, "finite, at least 0 and at most 100"),
    ("ema.edm.halflife_images", -5, "at least 0 and at most 1e+12"),
    ("diffusion.augment_prob", 1.5, "at least 0 and at most 1"),
    ("model.dropout", 1.5, "at least 0 and below 1"),
    ("batch_size", 0, "at least 1 and at most 1,000,000"),
    ("sampler.num_grid", -3, "at least 1 and at most 100,000; no grids"),
  ):
    config = digits.get_config("debug")
    with config.ignore_type():
      config.update_from_flattened_dict({path: value})
    with pytest.raises(UserError) as error:
      checks.check_consistent(config)
    assert f"config.{path}={value} must be {rest}" in str(error.value)
  config = digits.get_config("debug")
  config.model.channel_mult = (1, 0)
  with pytest.raises(UserError, match=r"config.model.channel_mult\[1\]=0 must"):
    ranges.check(config)


def test_sampler_fields_are_checked():
  config = digits.get_config("debug")
  config.sampler.steps = 10**11
  with pytest.raises(UserError, match="config.sampler.steps=100000000000 must"):
    SamplerOptions.from_config(config)
  with pytest.raises(
    UserError, match="--sweep: guidance_scale=nan must be fin"
  ):
    sweep.parse("guidance_scale=1,nan")


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("steps", 10**11, "^--steps=100000000000 must be at least 1"),
    ("guidance_scale", math.inf, "^--guidance_scale=inf must be finite"),
    ("guidance_power", -1.0, "^--guidance_power=-1.0 must be at least 0"),
    ("guidance_interval", ["nan", "1"], r"^--guidance_interval\[0\]=nan must"),
  ],
)
def test_flags_are_checked_by_their_names(name, value, message, monkeypatch):
  given = collections.defaultdict(lambda: types.SimpleNamespace(value=None))
  given[name].value = value
  fake = types.SimpleNamespace(FLAGS=given)
  monkeypatch.setattr(sampling_flags, "flags", fake)
  sampling = sampling_flags.SamplingFlags(*[None] * 8)
  with pytest.raises(UserError, match=message):
    sampling.apply(digits.get_config("debug").sampler)
