"""Compiles the real train step for devices that are not there."""

from collections.abc import Sequence
import dataclasses
import re

from absl import logging
import jax
from ml_collections import config_dict

from diffit_jax.training import cost
from diffit_jax.training import program as program_lib

_OOM = re.compile(
  r"([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Step:
  """A train step, traced and not yet compiled.

  Attributes:
    program: the run's parts.
    traced: result of `jax.jit(...).trace`.
    products: matrix products and convolutions that it runs, on all devices.
    forward_macs: multiply-accumulates of one network evaluation of one image.
    argument_bytes: size of its arguments on one device.
  """

  program: program_lib.Program
  traced: jax.stages.Traced
  products: tuple[cost.Product, ...]
  forward_macs: cost.Macs
  argument_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device while a step runs.

  Attributes:
    arguments: state and batch.
    temporaries: what the step needs besides; where it does not fit, a lower
      bound.
    outputs: that do not take the place of arguments.
    available: that a program may use, None where that is not known.
  """

  arguments: int
  temporaries: int
  outputs: int = 0
  available: float | None = None

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries + self.outputs


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a step.

  Attributes:
    memory: that it needs.
    fits: whether the device has that much.
    text: text of the program; None if it does not fit, or if libtpu fails to
      print what it made.
  """

  memory: Memory
  fits: bool
  text: str | None


def trace(config: config_dict.ConfigDict, devices: Sequence) -> Step:
  """Traces the train step of a config for a list of devices.

  Raises:
    UserError: the config does not fit together, or not on these devices.
  """
  program = program_lib.build(config, devices)
  arguments = program_lib.step_arguments(config, program)
  traced = program.train_step.trace(*arguments)
  # CPU devices stand for any: what is done on a CPU alone does not count.
  platform = devices[0].platform if devices[0].platform != "cpu" else ""
  state_bytes, batch_bytes = program_lib.argument_bytes(config, program)
  return Step(
    program=program,
    traced=traced,
    products=tuple(cost.products(traced.jaxpr.jaxpr, platform=platform)),
    forward_macs=program_lib.forward_macs(
      program.model, program.abstract.params, config.data.resolution
    ),
    argument_bytes=state_bytes + batch_bytes,
  )


def compile_step(step: Step, available: float | None = None) -> Compiled:
  """Compiles a traced step for its devices.

  Args:
    step: from `trace`.
    available: bytes of memory on a device, None where that is not known.
  """
  try:
    compiled = step.traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = parse_out_of_memory(str(error))
    if needed is None:
      raise
    total, available = needed
    temporaries = max(int(total) - step.argument_bytes, 0)
    memory = Memory(step.argument_bytes, temporaries, available=available)
    return Compiled(memory, False, None)
  stats = compiled.memory_analysis()
  memory = Memory(
    arguments=stats.argument_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    available=available,
  )
  fits = available is None or memory.total <= available
  return Compiled(memory, fits, _text(compiled))


def _text(compiled: jax.stages.Compiled) -> str | None:
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:  # of XLA's printer, for v6e
    logging.warning("no text of the compiled step: %s", error)
    return None


def parse_out_of_memory(message: str) -> tuple[float, float] | None:
  """(bytes needed, bytes available) of a compiler's error, None for others."""
  found = _OOM.search(message)
  if not found:
    return None
  needed, unit, available, available_unit = found.groups()
  return (
    float(needed) * _UNITS[unit],
    float(available) * _UNITS[available_unit],
  )
