"""Config and topology -> everything that a plan tells.

The formula for the FLOPs of a step is 6 x MAC x batch: two per
multiply-accumulate, and the backward pass costs two forward passes.
"""

from collections.abc import Sequence
import dataclasses

from absl import logging
from ml_collections import config_dict

from diffit_jax.models.compute import REMAT_POLICIES
from diffit_jax.planning import aot, hlo
from diffit_jax.planning import collectives as collectives_lib
from diffit_jax.planning import roofline as roofline_lib
from diffit_jax.planning import traffic as traffic_lib
from diffit_jax.planning.topology import Topology

REMATS = tuple(REMAT_POLICIES)  # from the fewest FLOPs to the most


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one step of a run needs on each chip.

  Attributes:
    config: config of the run.
    topology: the chips.
    mesh: {axis: devices}.
    attention: name of the kernel that computes it.
    memory: memory of one chip.
    fits: whether it has that much; None where its memory is not known.
    step_flops: FLOPs of the traced step's matrix products, on all chips.
    plain_flops: the same without recomputing anything in the backward pass.
    formula_flops: 6 x MAC x batch.
    bf16_flops: the passes of step_flops that a TPU makes.
    collectives: collectives of the compiled step; None if it does not fit or
      has no text.
    traffic: bytes that go to and from memory; None likewise.
    unknown_loops: loops of unknown length, that count as one run.
    roofline: least time of a step; None likewise, or for a CPU.
  """

  config: config_dict.ConfigDict
  topology: Topology
  mesh: dict[str, int]
  attention: str
  memory: aot.Memory
  fits: bool | None
  step_flops: int
  plain_flops: int
  formula_flops: int
  bf16_flops: int
  collectives: list[collectives_lib.Collective] | None = None
  traffic: traffic_lib.Traffic | None = None
  unknown_loops: int = 0
  roofline: roofline_lib.Roofline | None = None


def make_plan(
  config: config_dict.ConfigDict, topology: Topology, devices: Sequence
) -> Plan:
  """Traces and compiles the train step, and reads what came out.

  Args:
    config: the resolved config.
    topology: what the devices are.
    devices: from `topology.devices`.

  Raises:
    UserError: the config does not go with the devices.
  """
  step = aot.trace(config, devices)
  logging.info(
    "compiling the train step of %s for %s", config.name, topology.name
  )
  available = topology.chip.hbm_bytes if topology.chip else None
  compiled = aot.compile_step(step, available)
  plain = step
  if config.model.remat != "none":
    plain = aot.trace(changed(config, {"model.remat": "none"}), devices)
  flops = lambda traced: 2 * sum(p.macs for p in traced.products)
  plan = Plan(
    config=config,
    topology=topology,
    mesh=dict(step.program.mesh.shape),
    attention=step.program.model.attention,
    memory=compiled.memory,
    fits=compiled.fits if topology.chip else None,
    step_flops=flops(step),
    plain_flops=flops(plain),
    formula_flops=6 * step.forward_macs.total * config.batch_size,
    bf16_flops=roofline_lib.bf16_flops(step.products),
  )
  return _read_program(plan, compiled.text) if compiled.text else plan


def changed(
  config: config_dict.ConfigDict, fields: dict
) -> config_dict.ConfigDict:
  """A copy of a config with fields, named as model.remat, set."""
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def try_fields(plan: Plan, fields: dict, devices: Sequence) -> tuple[bool, int]:
  """(whether the config fits with these fields, bytes per chip)."""
  step = aot.trace(changed(plan.config, fields), devices)
  compiled = aot.compile_step(step, plan.memory.available)
  memory = compiled.memory
  logging.info(
    "%s: %.2f GiB per chip, %s",
    as_flags(fields),
    memory.total / 2**30,
    "fits" if compiled.fits else "too much",
  )
  return compiled.fits, memory.total


def as_flags(fields: dict) -> str:
  """Fields as flags."""
  return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def _read_program(plan: Plan, text: str) -> Plan:
  topology = plan.topology
  module = hlo.parse(text)
  found = collectives_lib.find(module, topology.num_chips, topology.num_slices)
  moved = traffic_lib.measure(module)
  bound = None
  if topology.chip:
    bound = roofline_lib.bound(
      topology.chip,
      plan.bf16_flops / topology.num_chips,
      moved,
      sum(c.wire_bytes for c in found),
      sum(c.dcn_bytes for c in found),
    )
  return dataclasses.replace(
    plan,
    collectives=found,
    traffic=moved,
    unknown_loops=hlo.count_runs(module)[1],
    roofline=bound,
  )
