"""Milliseconds per image of the FID Inception, by layer and beside PyTorch.

  python benchmarks/inception.py [--torch_python=PATH] [--json=FILE]

The weights are made up, the sizes real, and every figure is the median of
turns at full float32 precision. With a Python that has torch, the same network
there (`torch_inception.py`) takes turns with ours, on the same images, weights
and cores, and both must give the same features.
"""

from collections.abc import Callable
import contextlib
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
from unittest import mock

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.evaluation import (
  inception,
  inception_weights,
  load_inception,
  resize,
)
from diffit_jax.training import cost

_BATCH = flags.DEFINE_integer("batch_size", 16, "Images per call.", 1)
_TURNS = flags.DEFINE_integer("turns", 7, "Measured turns, after one.", 1)
_SIDE = flags.DEFINE_integer("side", 256, "Of the images to resize.", 1)
_TORCH = flags.DEFINE_string(
  "torch_python", None, "Python that has torch, to compare with."
)
_JSON = flags.DEFINE_string("json", None, "Also write the figures to a file.")


def seconds(function: Callable, *args) -> float:
  """One call, until its results are there."""
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def median_seconds(function: Callable, *args) -> float:
  jax.block_until_ready(function(*args))  # compiles
  return statistics.median(
    seconds(function, *args) for _ in range(_TURNS.value)
  )


def matmul_rate(n: int = 2048) -> float:
  """Products of float32 matrices, in 10^9 operations per second."""
  a = jnp.ones((n, n))
  product = jax.jit(
    lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST)
  )
  return 2 * n**3 / median_seconds(product, a) / 1e9


def made_up_state() -> dict[str, np.ndarray]:
  """Weights that keep the size of what passes through."""
  rng = np.random.default_rng(0)
  state = {}
  for name, shape in inception_weights.expected_shapes().items():
    values = rng.uniform(-1, 1, shape).astype(np.float32)
    if len(shape) == 4:
      state[name] = values * np.float32((6 / math.prod(shape[1:])) ** 0.5)
    else:
      is_scale = name.endswith(("bn.weight", "running_var"))
      state[name] = values * np.float32(0.1) + np.float32(is_scale)
  return state


def time_parts(params: dict, x: jax.Array) -> list[dict]:
  """A row for each layer of the stem and each block, on its own."""
  parts = [
    (getattr(row, "name", "max pool"), inception.Block(((row,),)))
    for row in inception.STEM
  ]
  parts += [(n, inception.Block(b)) for n, b in inception.BLOCKS.items()]
  rows = []
  for name, module in parts:
    own = params.get(name, {})
    if "kernel" in own:
      own = {name: own}  # a layer of the stem, as a block of one
    run = jax.jit(lambda p, x, m=module: m.apply({"params": p}, x)[0])
    took, macs = median_seconds(run, own, x), cost.count_macs(run, own, x).total
    y = run(own, x)
    rows.append(
      {
        "part": name,
        "size": f"{x.shape[1]} -> {y.shape[1]}",
        "channels": f"{x.shape[-1]} -> {y.shape[-1]}",
        "ms": 1e3 * took / len(x),
        "gflops": 2 * macs / took / 1e9,
      }
    )
    x = y
  return rows


def plain_convolve(x, kernel, stride, padding):
  """What `inception.convolve` would be without its two tricks."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )


def network() -> Callable:
  """A new jitted network, traced with what `inception` holds by then."""
  module = inception.Inception()
  return jax.jit(lambda params, x: module.apply({"params": params}, x))


def time_network(params: dict, x: jax.Array) -> dict[str, float]:
  """Seconds of one call, in variants."""
  took = {"network": median_seconds(network(), params, x)}
  with mock.patch.object(inception, "convolve", plain_convolve):
    took["network, plain convolutions"] = median_seconds(network(), params, x)
  images = np.zeros((len(x), _SIDE.value, _SIDE.value, 3), np.uint8)
  prepare = jax.jit(
    lambda images: resize.prepare(images, inception.SIDE, resize.RULES[0])
  )
  took[f"resize from {_SIDE.value}"] = median_seconds(prepare, images)
  return took


@contextlib.contextmanager
def torch_process(state: dict, x: np.ndarray):
  """Starts the yardstick; gives its features, version and a timed turn."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    with open(folder / "weights", "wb") as file:
      for key in sorted(state):
        file.write(np.ascontiguousarray(state[key], "<f4").data)
    np.ascontiguousarray(x.transpose(0, 3, 1, 2), "<f4").tofile(
      folder / "images"
    )
    script = pathlib.Path(__file__).with_name("torch_inception.py")
    command = [_TORCH.value, str(script), str(folder), str(len(x))]
    with subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
      version = process.stdout.readline().strip()
      if not version:
        raise SystemExit(f"{_TORCH.value} could not run {script}")
      features = np.fromfile(folder / "features", "<f4").reshape(len(x), -1)

      def turn() -> float:
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

      yield features, version, turn
      process.stdin.close()


def compare(state: dict, params: dict, x: np.ndarray) -> dict:
  """Ours and PyTorch's forward pass, in turns."""
  ours = network()
  with torch_process(state, x) as (features, version, turn):
    found = np.asarray(ours(params, x)["pool"])
    off = np.abs(found - features).max() / np.abs(features).max()
    if not off < 1e-4:
      raise SystemExit(f"features differ by {off:.1e} of the largest")
    times = [
      (seconds(ours, params, x), turn()) for _ in range(_TURNS.value + 1)
    ]
  mine, its = (statistics.median(t) / len(x) for t in zip(*times[1:]))
  return {
    "version": version,
    "ours_ms": 1e3 * mine,
    "torch_ms": 1e3 * its,
    "ratio": mine / its,
    "difference": float(off),
  }


def print_report(report: dict) -> None:
  print(report["machine"])
  print("\n| part | size | channels | ms/image | GFLOP/s |")
  print("|---|---|---|---|---|")
  for row in sorted(report["parts"], key=lambda row: -row["ms"]):
    print(
      f"| {row['part']} | {row['size']} | {row['channels']}"
      f" | {row['ms']:.2f} | {row['gflops']:.0f} |"
    )
  print("\n| whole | ms/image |")
  print("|---|---|")
  for name, ms in report["ms"].items():
    print(f"| {name} | {ms:.1f} |")
  beside = report["torch"]
  if beside:
    print(
      f"\nin turns: ours {beside['ours_ms']:.1f} ms/image, {beside['version']}"
      f" {beside['torch_ms']:.1f}, ratio {beside['ratio']:.2f}; features"
      f" differ by {beside['difference']:.0e} of the largest"
    )


def main(_) -> None:
  state = made_up_state()
  params = jax.device_put(load_inception(state).params)
  shape = (_BATCH.value, inception.SIDE, inception.SIDE, 3)
  x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  macs = cost.count_macs(network(), params, x).total / len(x)
  report = {
    "machine": (
      f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}, jax"
      f" {jax.__version__}, batch {len(x)}, median of {_TURNS.value} turns;"
      f" matrix products {matmul_rate():.0f} GFLOP/s; {macs / 1e9:.2f} GMACs"
      " per image"
    ),
    "parts": time_parts(params, jnp.asarray(x)),
    "ms": {
      name: 1e3 * took / len(x)
      for name, took in time_network(params, jnp.asarray(x)).items()
    },
    "torch": compare(state, params, x) if _TORCH.value else None,
  }
  print_report(report)
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(report, file, indent=2)


if __name__ == "__main__":
  app.run(main)
