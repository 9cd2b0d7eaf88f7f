"""How a config's `sampler` section says to sample, checked and sorted."""

import ast
from collections.abc import Mapping
import dataclasses

from diffit_jax import ranges, sampling
from diffit_jax.diffusion import kinds
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.errors import UserError

_GUIDANCE = [field.name for field in dataclasses.fields(Guidance)]


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
  """`config.sampler`, sorted by who it is for.

  Attributes:
    solver: name of the solver.
    solver_options: its arguments, steps included.
    guidance: the rule of guidance.
  """

  solver: str
  solver_options: dict
  guidance: Guidance

  @classmethod
  def from_config(cls, config: Mapping) -> "SamplerOptions":
    """Sorts the fields, and refuses those that cannot work."""
    ranges.check(config["sampler"], "sampler")
    fields = dict(config["sampler"])
    fields.pop("num_grid", None)
    rule = {
      name.removeprefix("guidance_"): fields.pop(name)
      for name in list(fields)
      if name.startswith("guidance_")
    }
    lead = fields.pop("guide_scale", 1.0)
    solver = fields.pop("solver")
    options = _parse(fields.pop("solver_options", ""))
    for name in ("solver", "steps", "process"):
      if name in options:
        raise UserError(
          f"solver_options: {name} is no option of a solver; steps and solver"
          " are fields of their own"
        )
    fields |= options
    guidance = dataclasses.replace(
      _make_guidance(config, rule), guide_scale=lead
    )
    kind = config["diffusion"]["kind"]
    process = kinds.row(config["diffusion"]).SOLVERS
    if process not in sampling.SOLVERS.get(solver, [process]):
      raise UserError(
        f"solver {solver!r} is not for a model of diffusion.kind={kind!r}: use"
        f" {sampling.by_process()}"
      )
    fields |= sampling.process_options(solver, process)
    made = sampling.make_solver(solver, **fields)  # refuses unknown options
    kinds.check_levels(config["diffusion"], made.levels)
    return cls(solver, fields, guidance)

  def num_evaluations(self) -> tuple[int, int]:
    """(evaluations with the label, those of them without the other half)."""
    made = sampling.make_solver(self.solver, **self.solver_options)
    return made.num_evaluations, made.num_skipped(self.guidance.skippable)


def _make_guidance(config: Mapping, rule: dict) -> Guidance:
  """The rule of the fields guidance_*, refused where it cannot be had."""
  # The noise channels alone: a learned variance is never guided.
  most = config["model"]["channels"]
  channels = rule.get("channels") or most
  if not 1 <= channels <= most:
    raise UserError(
      f"guidance_channels={channels} must be from 1 to the {most} channels, or"
      " 0 for all of them"
    )
  for name in rule:
    if name not in _GUIDANCE:
      raise UserError(f"there is no sampler field guidance_{name}")
  solvers = kinds.row(config["diffusion"]).SOLVERS
  if rule.get("schedule") == "power_cosine" and solvers != "adm":
    raise UserError(
      "guidance_schedule='power_cosine' goes by the timesteps of"
      " diffusion.kind='adm', and this model has noise levels: use constant"
    )
  interval = tuple(rule.get("interval", ())) or None
  guidance = Guidance(**rule | {"channels": channels, "interval": interval})
  if not guidance.is_off:
    _check_model(config, guidance.scale)
  return guidance


def _check_model(config: Mapping, scale: float) -> None:
  """Refuses guidance where the model cannot give it."""
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


def _parse(text: str) -> dict:
  """{"eta": 1, "spacing": "trailing"} from "eta=1,spacing=trailing"."""
  options = {}
  for item in filter(None, text.split(",")):
    name, is_assignment, value = item.partition("=")
    if not is_assignment:
      raise UserError(
        f"solver_options={text!r}: write name=value, separated by commas"
      )
    if name in options:
      raise UserError(f"solver_options={text!r}: {name} stands there twice")
    try:
      options[name] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      options[name] = value
  return options
