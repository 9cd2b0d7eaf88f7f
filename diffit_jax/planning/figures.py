"""A plan as plain numbers, for JSON and for the table."""

import importlib.metadata

from diffit_jax.planning import collectives as collectives_lib
from diffit_jax.planning.planner import Plan

_GIB = 2**30
# Images of the training sets, by what data.name starts with.
DATA_SIZES = {
  "cifar10": 50_000,
  "ffhq": 70_000,
  "imagenet": 1_281_167,
  "digits": 1_797,
}


def to_json(plan: Plan) -> dict:
  """The plan as plain numbers; null is what could not be known.

  Ranges are [better end, worse end].
  """
  config, topology, memory = plan.config, plan.topology, plan.memory
  chips, bound = topology.num_chips, plan.roofline
  total = memory.total
  over = max(total - memory.available, 0) if memory.available else None
  card = {
    "config": config.name,
    "topology": topology.name,
    "chips": chips,
    "num_slices": topology.num_slices,
    "mesh": plan.mesh,
    "batch_size": config.batch_size,
    "batch_per_chip": config.batch_size // chips,
    "num_microbatches": config.num_microbatches,
    "remat": config.model.remat,
    "attention": plan.attention,
    "arguments_gib": memory.arguments / _GIB,
    "temporaries_gib": memory.temporaries / _GIB,
    "outputs_gib": memory.outputs / _GIB,
    "total_gib": total / _GIB,
    "hbm_gib": memory.available and memory.available / _GIB,
    "fits": plan.fits,
    "over_gib": over and over / _GIB,
    "flops_per_step": plan.step_flops,
    "formula_flops": plan.formula_flops,
    "flops_ratio": plan.step_flops / plan.formula_flops,
    "recompute_overhead": plan.step_flops / plan.plain_flops - 1,
    "bf16_passes": plan.bf16_flops / plan.step_flops,
    "collectives": None,
    "wire_gb": None,
    "wire_gb_by_kind": None,
    "dcn_gb": None,
    "hbm_traffic_gb": None,
    "hbm_traffic_tiled_gb": None,
    "roofline_ms": None,
    "bound_by": None,
    "step_ms": None,
    "mfu": None,
    "epochs_per_day": None,
    "chip_hours": None,
    "total_steps": config.total_steps,
    "missing": missing(plan),
    "versions": versions(),
  }
  if plan.collectives is not None:
    by_kind = dict.fromkeys(collectives_lib.KINDS, 0.0)
    for each in plan.collectives:
      by_kind[each.kind] += each.wire_bytes / 1e9
    card |= {
      "collectives": collectives_lib.count(plan.collectives),
      "wire_gb": sum(by_kind.values()),
      "wire_gb_by_kind": by_kind,
      "dcn_gb": sum(c.dcn_bytes for c in plan.collectives) / 1e9,
      "hbm_traffic_gb": [plan.traffic.hbm / 1e9, plan.traffic.touched / 1e9],
      "hbm_traffic_tiled_gb": plan.traffic.tiled / 1e9,
    }
  if bound:
    step = [ms / 1e3 for ms in bound.step]
    peak = topology.chip.bf16_flops * chips
    images = data_size(config)
    card |= {
      "roofline_ms": {
        name: list(getattr(bound, name))
        for name in ("compute", "hbm", "wire", "dcn")
      },
      "bound_by": list(bound.bound),
      "step_ms": list(bound.step),
      "mfu": [plan.formula_flops / (peak * t) for t in step],
      "epochs_per_day": images
      and [86400 / t * config.batch_size / images for t in step],
      "chip_hours": [config.total_steps * t * chips / 3600 for t in step],
    }
  return card


def data_size(config) -> int | None:
  """Images of the training set, None if the name says nothing."""
  for name, size in DATA_SIZES.items():
    if config.data.name.startswith(name):
      return size
  return None


def missing(plan: Plan) -> list[str]:
  """What this plan cannot tell, and why."""
  found = []
  if plan.topology.chip is None:
    found += [
      "fits: the memory of a CPU device is the machine's",
      "roofline, step time, MFU, epochs per day, chip-hours: there is no table"
      " of what a CPU can do",
      "a TPU's own fusions, layouts and collectives: XLA's CPU compiler made"
      " this program, which also computes bfloat16 in float32; with libtpu,"
      " plan for a TPU slice to see them",
    ]
  elif plan.collectives is None and plan.fits:
    found.append(
      "collectives, traffic, step time: libtpu compiled the step, but this"
      " version of it fails to print the program"
    )
  elif plan.collectives is None:
    found.append(
      "collectives, traffic, step time: the compiler gives up on a program that"
      " does not fit; temporaries are a lower bound"
    )
  elif data_size(plan.config) is None:
    found.append(
      f"epochs per day: the size of {plan.config.data.name!r} is not known"
    )
  if plan.unknown_loops:
    found.append(
      f"the length of {plan.unknown_loops} loops: bytes and collectives in them"
      " count once"
    )
  return found


def versions() -> dict[str, str | None]:
  """The versions of what compiles."""
  found = {}
  for name in ("jax", "jaxlib", "libtpu"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found
