"""What would make a config fit that does not, each answer compiled.

That a step does not fit shows within seconds; one that fits takes as long as
any compilation.
"""

from collections.abc import Iterator, Sequence
import dataclasses

from ml_collections import config_dict

from diffit_jax.planning import planner
from diffit_jax.planning.planner import Plan

_GIB = 2**30
_MAX_FSDP = 16  # with more, gathering weights costs more than it saves


@dataclasses.dataclass(frozen=True)
class Trial:
  """One config that was compiled.

  Attributes:
    fields: that differ from the plan's config.
    fits: whether it fits.
    total: bytes per chip; where it does not fit, at least so many.
  """

  fields: dict
  fits: bool
  total: int


def find(plan: Plan, devices: Sequence) -> list[Trial]:
  """Tries changes, from the least to the most costly, until one fits.

  Args:
    plan: plan of a config that does not fit.
    devices: its devices.

  Returns:
    All trials; the last one fits, if any does.
  """
  trials = []
  for fields in remedies(plan.config, plan.mesh, plan.topology.num_slices):
    fits, total = planner.try_fields(plan, fields, devices)
    trials.append(Trial(fields, fits, total))
    if fits:
      break
  return trials


def remedies(
  config: config_dict.ConfigDict, mesh: dict[str, int], num_slices: int = 1
) -> Iterator[dict]:
  """Sets of config fields that need less memory, without more chips."""
  num_chips = mesh["data"] * mesh["fsdp"]
  fsdp = min(_MAX_FSDP, num_chips // num_slices)
  while num_chips // num_slices % fsdp:
    fsdp -= 1
  sharded = {}
  if mesh["fsdp"] < fsdp:
    sharded = {"mesh.data": -1, "mesh.fsdp": fsdp}
    yield sharded
  stronger = planner.REMATS[planner.REMATS.index(config.model.remat) + 1 :]
  for remat in stronger:
    yield {"model.remat": remat}
  if sharded:
    for remat in stronger:
      yield sharded | {"model.remat": remat}
  best = sharded | ({"model.remat": stronger[-1]} if stronger else {})
  parts, per_chip = config.num_microbatches, config.batch_size // num_chips
  for more in (2, 4, 8, 16):
    if per_chip % (parts * more) == 0:
      yield best | {"num_microbatches": parts * more}


def to_json(trials: list[Trial]) -> dict:
  """What fits, and what was tried."""
  rows = [
    {
      "fields": trial.fields,
      "fits": trial.fits,
      "total_gib": trial.total / _GIB,
    }
    for trial in trials
  ]
  return {
    "found": rows[-1] if rows and rows[-1]["fits"] else None,
    "tried": rows,
  }


def to_text(trials: list[Trial]) -> str:
  """The same for people."""
  lines = []
  for trial in trials:
    verdict = "fits" if trial.fits else "too much"
    at_least = "" if trial.fits else "at least "
    lines.append(
      f"  {planner.as_flags(trial.fields)}:"
      f" {at_least}{trial.total / _GIB:.2f} GiB, {verdict}"
    )
  if trials and trials[-1].fits:
    return "\n".join(["it fits with (each was compiled):", *lines])
  return "\n".join(
    [
      "no other way to run this batch on these chips fits; use more chips or a"
      " smaller batch_size. Tried:",
      *lines,
    ]
  )
