"""What the stages that use JAX share: its first device, weights, times."""

from collections.abc import Callable
import importlib
import time

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from benchmarks.on_device import clock
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.parallel import platforms

GIB = 2**30
# Sizes of the latent model for a CPU.
TINY = {
  "data.resolution": 8,
  "model.input_size": 8,
  "model.hidden_dim": 32,
  "model.depth": 2,
  "model.num_heads": 2,
}


def first() -> jax.Device:
  """The device that is measured: one, however many there are."""
  return platforms.wake()[0]


def card() -> str:
  return first().device_kind


def attentions() -> dict[str, str | None]:
  """{implementation: why it cannot run here, or None}."""
  found = {}
  for name in kernels.KERNELS:
    try:
      kernels.check_machine(
        name, first().platform, first().device_kind, "bfloat16"
      )
      found[name] = None
    except UserError as error:
      found[name] = str(error)
  return found


def read_config(text: str, **fields) -> config_dict.ConfigDict:
  """The config of configs/ that `text` names (name:variants), changed."""
  name, _, variant = text.partition(":")
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config(variant or None)
  config.update_from_flattened_dict(fields)
  return config


def made_up(shapes, seed: int = 0):
  """Weights under which nothing is zero, made on the device.

  Args:
    shapes: tree of arrays or of their shapes.
    seed: of the draws.
  """
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))

  def fill(key, leaf):
    fan_in = max(leaf.shape[-2] if len(leaf.shape) > 1 else 1, 1)
    values = jax.random.normal(key, leaf.shape, jnp.float32) * fan_in**-0.5
    return values.astype(leaf.dtype)

  return tree.unflatten([fill(k, x) for k, x in zip(keys, leaves)])


def peak_gib() -> dict[str, float | None]:
  """The most memory of the device that this process has held so far."""
  stats = first().memory_stats() or {}  # a CPU has none
  peak = stats.get("peak_bytes_in_use")
  return {"peak so far GiB": None if peak is None else peak / GIB}


def compiled(function: Callable, *args, **options) -> tuple[Callable, dict]:
  """A jitted function's program for these arguments, and what it took.

  Args:
    function: jitted.
    *args: arrays or their shapes.
    **options: of the compiler.

  Returns:
    The program; {"compile s", and "needs GiB", the memory of its arguments,
    results and temporaries}.
  """
  lowered = function.lower(*args)
  start = time.perf_counter()
  program = lowered.compile(compiler_options=options or None)
  took = time.perf_counter() - start
  memory = program.memory_analysis()
  size = lambda name: getattr(memory, f"{name}_size_in_bytes")
  needs = size("argument") + size("output") + size("temp") - size("alias")
  return program, {"compile s": took, "needs GiB": needs / GIB}


def does_not_fit(needs_gib: float) -> str | None:
  """Why a program of that size is not to be started, if so."""
  limit = (first().memory_stats() or {}).get("bytes_limit")
  if limit and needs_gib > limit / GIB:
    return f"does not fit into {limit / GIB:.1f} GiB"
  return None


def seconds(call: Callable, **kwargs) -> float:
  """Seconds of a call that returns arrays; see `clock`."""
  return clock.seconds_per_call(call, jax.block_until_ready, **kwargs)
