"""Milliseconds per image of the FID Inception, by layer and beside PyTorch.

  python -m benchmarks.inception [--torch_python=PATH] [--json=FILE]

The weights are made up, the sizes real, and every figure is the median of
turns at full float32 precision. With a Python that has torch, the same network
there takes turns with ours, on the same images, weights and cores, and must
give the same features.
"""

from collections.abc import Callable
import functools
import math
import pathlib
import tempfile
from unittest import mock

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import report, yardstick
from diffit_jax.evaluation import load_inception
from diffit_jax.evaluation.features import (
  RESIZE_RULES,
  inception,
  inception_weights,
  resize,
)
from diffit_jax.training import cost

_BATCH = flags.DEFINE_integer("batch_size", 16, "Images per call.", 1)
_TURNS = flags.DEFINE_integer("turns", 5, "Measured turns, after one.", 1)
_SIDE = flags.DEFINE_integer("side", 256, "Of the images to resize.", 1)


def median_seconds(function: Callable, *args) -> float:
  call = functools.partial(report.seconds, function, *args)
  return report.medians(report.in_turns({"": call}, _TURNS.value))[""]


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
    lambda images: resize.prepare(images, inception.SIDE, RESIZE_RULES[0])
  )
  took[f"resize from {_SIDE.value}"] = median_seconds(prepare, images)
  return took


def compare(state: dict, params: dict, x: np.ndarray, call: Callable) -> dict:
  """Ours and PyTorch's forward pass, in turns."""
  ours = network()
  with tempfile.TemporaryDirectory() as folder:
    path = lambda name: str(pathlib.Path(folder, name))
    save_file(state, path("weights"))
    save_file({"x": x}, path("images"))
    call("load", weights=path("weights"), images=path("images"))
    call("run", output=path("features"))
    features = load_file(path("features"))["features"]
  off = yardstick.check_equal(ours(params, x)["pool"], features, "features")
  times = report.in_turns(
    {
      "ours": functools.partial(report.seconds, ours, params, x),
      "torch": functools.partial(call, "run"),
    },
    _TURNS.value,
  )
  ms = {k: 1e3 * v / len(x) for k, v in report.medians(times).items()}
  return {
    "ours ms/image": ms["ours"],
    "torch ms/image": ms["torch"],
    "ours / torch": ms["ours"] / ms["torch"],
    "largest difference": off,
  }


def main(_) -> None:
  state = made_up_state()
  params = jax.device_put(load_inception(state).params)
  batch = 8 if report.SHORT.value else _BATCH.value
  shape = (batch, inception.SIDE, inception.SIDE, 3)
  x = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
  macs = cost.count_macs(network(), params, x).total / len(x)
  whole = [
    {"part": name, "ms/image": 1e3 * took / len(x)}
    for name, took in time_network(params, jnp.asarray(x)).items()
  ]
  tables = [report.Table(f"The network, batch {batch}", whole)]
  if not report.SHORT.value:
    rows = time_parts(params, jnp.asarray(x))
    rows.sort(key=lambda row: -row["ms"])
    tables.append(report.Table("Its parts, slowest first", rows))
  with yardstick.start("inception") as (about, call):
    if call:
      rows = [compare(state, params, x, call)]
      tables.append(report.Table("Beside PyTorch, in turns", rows))
  rate = (
    f"Products of float32 matrices: {report.matmul_rate():.0f} GFLOP/s;"
    f" {macs / 1e9:.2f} GMACs per image."
  )
  report.emit(tables, [about, rate])


if __name__ == "__main__":
  app.run(main)
