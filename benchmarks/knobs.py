"""What each memory and speed knob buys: plans of one config, side by side.

  python benchmarks/knobs.py [CONFIG] [TOPOLOGY]

Compiles the real train step of ImageNet-256 for a v5e:4x4 (or what is given)
once per row, changing one knob, and prints one table. Compile-time numbers:
nothing runs.
"""

import importlib
import sys

from diffit_jax.planning import topology as topology_lib

KNOBS = (
  ("as configured", {}),
  ("model.remat=none", {"model.remat": "none"}),
  ("model.remat=full", {"model.remat": "full"}),
  ("num_microbatches=4", {"num_microbatches": 4}),
  ("mesh.fsdp=1", {"mesh.fsdp": 1}),
  ("model.dtype=float32", {"model.dtype": "float32"}),
  ("model.scan_blocks=False", {"model.scan_blocks": False}),
)
HEADER = (
  "| knob | args + temp GiB | fits | FLOPs / formula | wire GB | step ms |"
)


def main(name: str = "imagenet256", topology: str = "v5e:4x4") -> None:
  chips = topology_lib.parse(topology)
  topology_lib.prepare_environment(chips)
  devices = topology_lib.devices(chips)
  from diffit_jax.planning import planner

  config = importlib.import_module(f"configs.{name}").get_config()
  print(f"{name}, batch {config.batch_size}, {topology}", flush=True)
  print(HEADER)
  print("|---" * HEADER.count(" | ") + "|---|", flush=True)
  for knob, fields in KNOBS:
    if not all(_has(config, field) for field in fields):
      continue
    plan = planner.make_plan(planner.changed(config, fields), chips, devices)
    print(f"| {knob} | {_cells(plan)} |", flush=True)


def _has(config, path: str) -> bool:
  *sections, field = path.split(".")
  for section in sections:
    config = config[section]
  return field in config


def _cells(plan) -> str:
  memory = plan.memory
  gib = lambda amount: f"{amount / 2**30:.2f}"
  wire = step = "-"
  if plan.collectives is not None:
    wire = f"{sum(c.wire_bytes for c in plan.collectives) / 1e9:.2f}"
  if plan.roofline is not None:
    step = " to ".join(f"{ms:.0f}" for ms in plan.roofline.step)
  ratio = plan.step_flops / plan.formula_flops
  return (
    f"{gib(memory.arguments)} + {gib(memory.temporaries)} |"
    f" {'yes' if plan.fits else 'no'} | {ratio:.3f} | {wire} | {step}"
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
