"""Stages of the train step: imagenet256, imagenet512, cifar10, ffhq64.

The config's real step on noise: draws, loss, gradient, optimizer, EMA, on one
device. What does not fit into its memory is said so, and not tried.
"""

import dataclasses
import functools

import jax
from ml_collections import config_dict
import numpy as np

from benchmarks.on_device import device, rows
from diffit_jax.parallel import sharding
from diffit_jax.run import state as state_lib
from diffit_jax.training import program as program_lib

card = device.card


@dataclasses.dataclass(frozen=True)
class Variant:
  """One form of a latent model's train step.

  Attributes:
    attention: implementation.
    remat: what the backward pass recomputes.
    batch_size: images per step.
    scan_blocks: whether the blocks are a loop.
    options: of the compiler, as an NVIDIA GPU has them.
  """

  attention: str
  remat: str
  batch_size: int
  scan_blocks: bool = True
  options: dict = dataclasses.field(default_factory=dict)


VARIANTS = {
  "imagenet256": (
    Variant("xla", "dots", 64),
    Variant("cudnn", "dots", 64),
    Variant("xla", "none", 64),
    Variant("cudnn", "none", 128),
    Variant("xla", "dots", 128),
    Variant("xla", "dots", 256),
    Variant("cudnn", "dots", 256),
    Variant("xla", "dots", 64, options={"xla_gpu_enable_triton_gemm": False}),
    Variant("xla", "full", 256),
    Variant("cudnn", "none", 32),
    Variant("xla", "dots", 32),
    Variant("xla", "dots", 64, scan_blocks=False),
  ),
  "imagenet512": (
    Variant("xla", "dots", 32),
    Variant("cudnn", "dots", 32),
    Variant("cudnn", "none", 16),
    Variant("xla", "full", 32),
    Variant("xla", "none", 8),
  ),
}
# Fields of an image model's config, which is float32 at precision "highest".
PRECISIONS = {
  "bfloat16": {"model.dtype": "bfloat16", "matmul_precision": "default"},
  "default": {"matmul_precision": "default"},  # TF32 on NVIDIA
  "highest": {"matmul_precision": "highest"},
}
TINY_IMAGE = {
  "batch_size": 2,
  "model.base_channels": 16,
  "model.head_dim": 8,
  "model.num_blocks": 1,
  "model.channel_mult": (1, 2),
}


class Trainer:
  """Measures train steps; the state is kept from one to the next."""

  def __init__(self):
    self.state = None

  def measure(self, config: config_dict.ConfigDict, options: dict) -> dict:
    """Columns of one row.

    Args:
      config: the resolved config.
      options: of the compiler.
    """
    program = program_lib.build(config, [device.first()])
    arguments = program_lib.step_arguments(config, program)
    step, row = device.compiled(program.train_step, *arguments, **options)
    if reason := device.does_not_fit(row["needs GiB"]):
      return {**row, "skipped": reason}
    self._make_state(program)
    batch = sharding.put_batch(program.mesh, make_batch(config))
    monitor = state_lib.new_monitor(program.mesh)

    def run():
      nonlocal monitor
      self.state, monitor = step(self.state, monitor, batch)
      return monitor.loss

    s = device.seconds(run, at_least=1.0)
    side = config.data.resolution
    macs = program_lib.forward_macs(
      program.model, program.abstract.params, side
    ).total
    rate = config.batch_size / s
    return {
      "ms": 1e3 * s,
      "images/s": rate,
      "model TFLOP/s": 6 * macs * rate / 1e12,
      **row,
      **device.peak_gib(),
      "mean loss": float(monitor.loss / monitor.steps),
      "first bad step": int(monitor.bad_step),  # -1 is none
    }

  def _make_state(self, program) -> None:
    """Makes a state unless the last one is whole and of the same shapes."""
    leaves = jax.tree.leaves(self.state)
    is_whole = leaves and not any(x.is_deleted() for x in leaves)
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    if is_whole and shapes(self.state) == shapes(program.abstract):
      return
    self.state = leaves = None  # frees what an error left of the last one
    state = state_lib.create(program.init, program.mesh)
    self.state = state.replace(params=device.made_up(state.params))


def make_batch(config: config_dict.ConfigDict) -> dict[str, np.ndarray]:
  """A batch as the pipeline gives it, of noise."""
  rng, b = np.random.default_rng(0), config.batch_size
  num_classes = max(config.model.num_classes, 1)
  batch = {
    "label": rng.integers(0, num_classes, b).astype(np.int32),
    "index": np.arange(b, dtype=np.uint32),
  }
  for name, leaf in program_lib.batch_shapes(config).items():
    if name == "moments":
      batch[name] = rng.standard_normal(leaf.shape, np.float32)
    if name == "image":
      batch[name] = rng.integers(0, 256, leaf.shape, np.uint8)
  return batch


def train_latent(record: rows.Record, name: str) -> None:
  trainer, hindrances = Trainer(), device.attentions()
  variants = VARIANTS[name]
  if record.is_tiny:  # those that differ in more than the batch
    small = (dataclasses.replace(v, batch_size=2) for v in variants)
    variants = list({repr(v): v for v in small}.values())
  for variant in variants:
    fields = {
      "batch_size": variant.batch_size,
      "model.attention": variant.attention,
      "model.remat": variant.remat,
      "model.scan_blocks": variant.scan_blocks,
      **(device.TINY if record.is_tiny else {}),
    }
    about = {
      "attention": variant.attention,
      "remat": variant.remat,
      "batch": variant.batch_size,
      "blocks": "loop" if variant.scan_blocks else "unrolled",
      "precision": "bfloat16",
    }
    case = " ".join([name, *(f"{k}={v}" for k, v in variant.options.items())])
    reason = hindrances[variant.attention]
    if variant.options and device.first().platform != "gpu":
      reason = "needs a compiler for GPUs"
    if reason:
      record.add(case, **about, skipped=reason)
      continue
    config = device.read_config(name, **fields)
    measure = functools.partial(trainer.measure, config, variant.options)
    record.attempt(case, measure, least=20, **about)


def train_image(record: rows.Record, name: str, batch_size: int) -> None:
  for precision, fields in PRECISIONS.items():
    fields = {"batch_size": batch_size, **fields}
    if record.is_tiny:
      fields |= TINY_IMAGE
    config = device.read_config(name, **fields)
    measure = functools.partial(Trainer().measure, config, {})
    about = {"batch": config.batch_size, "precision": precision}
    record.attempt(name, measure, least=30, **about)


imagenet256 = functools.partial(train_latent, name="imagenet256")
imagenet512 = functools.partial(train_latent, name="imagenet512")
cifar10 = functools.partial(train_image, name="cifar10", batch_size=512)
ffhq64 = functools.partial(train_image, name="ffhq64", batch_size=64)
