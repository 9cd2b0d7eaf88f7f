"""Stages `machine` and `ceilings`: what the card is, and the most it gives."""

import ctypes
import functools
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.on_device import device, rows

card = device.card

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections"),
  *("numpy", "torch", "triton", "libtpu"),
  *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
# Name -> (dtype, precision) of products of matrices.
PRECISIONS = {
  "bfloat16": (jnp.bfloat16, "default"),
  "default": (jnp.float32, "default"),  # TF32 on NVIDIA, bfloat16 on a TPU
  "high": (jnp.float32, "high"),
  "highest": (jnp.float32, "highest"),
}
# The linear maps of imagenet256's blocks: (in, out).
MAPS = {
  "qkv": (1152, 3456),
  "proj": (1152, 1152),
  "fc1": (1152, 4608),
  "fc2": (4608, 1152),
}


def machine(record: rows.Record) -> None:
  about = report.machine(report.installed(PACKAGES), device=device.first())
  about |= {"cudnn": cudnn_version(), "nvidia_smi": ask_nvidia_smi()}
  about["xla_flags"] = os.environ.get("XLA_FLAGS", "")
  del about["commit"], about["date"]  # every row has them
  about.pop("card")
  record.add("machine", **{k: v for k, v in about.items() if v})


def cudnn_version() -> str | None:
  """Of the library that JAX loaded."""
  try:
    number = ctypes.CDLL("libcudnn.so.9").cudnnGetVersion()
  except OSError:
    return None
  return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def ask_nvidia_smi() -> str | None:
  fields = "driver_version,memory.total,clocks.max.sm,power.limit"
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return "; ".join(done.stdout.splitlines()) or None


def ceilings(record: rows.Record) -> None:
  side = 256 if record.is_tiny else 8192
  for name in PRECISIONS:
    record.attempt(
      f"{side} x {side} x {side}",
      functools.partial(square, side, name),
      precision=name,
    )
  record.attempt(
    "copy",
    functools.partial(copy, 2**20 if record.is_tiny else 2**30),
    table="copy",
  )
  num_tokens = 32 if record.is_tiny else 64 * 256
  for name, (inputs, outputs) in MAPS.items():
    record.attempt(
      f"{name} {num_tokens} x {inputs} x {outputs}",
      functools.partial(product, num_tokens, inputs, outputs),
      precision="bfloat16",
    )


def square(side: int, name: str) -> dict:
  """Rate of a product, and its error relative to float64."""
  dtype, precision = PRECISIONS[name]
  a, b = (
    jax.random.normal(jax.random.key(i), (side, side), dtype) for i in (0, 1)
  )
  run = jax.jit(functools.partial(jnp.dot, precision=precision))
  found = rate(run, a, b)
  part = (slice(512), slice(512))
  exact = np.asarray(a[part], np.float64) @ np.asarray(b[part], np.float64)
  off = np.asarray(run(a[part], b[part]), np.float64) - exact
  off = np.linalg.norm(off) / np.linalg.norm(exact)
  return {**found, "relative error": float(off)}


def product(rows: int, inputs: int, outputs: int) -> dict:
  a = jax.random.normal(jax.random.key(0), (rows, inputs), jnp.bfloat16)
  b = jax.random.normal(jax.random.key(1), (inputs, outputs), jnp.bfloat16)
  return rate(jax.jit(jnp.dot), a, b)


def rate(run, a, b) -> dict:
  s = device.seconds(lambda: run(a, b))
  flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
  return {"ms": 1e3 * s, "TFLOP/s": flops / s / 1e12}


def copy(size: int) -> dict:
  """Rate at which memory is read and written."""
  x = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
  run = jax.jit(lambda x: x * 1.0000001)
  s = device.seconds(lambda: run(x))
  return {"MiB": 4 * size / 2**20, "ms": 1e3 * s, "TB/s": 8 * size / s / 1e12}
