"""Seconds of forward pass and train step, beside PyTorch's, and peak memory.

  python -m benchmarks.train_step [--configs=imagenet256,ffhq64] [--depth=28]
      [--torch_python=PATH] [--json=FILE]

Each config's real network and step, float32, on noise: draws, loss, gradient,
optimizer, EMA. PyTorch gets the same weights and must give the same outputs
and, in a shallow network, the same gradients. It has no augmentation, keeps
everything for its backward pass and runs one block after the other, so ours
does, too (remat=none, scan_blocks=False). `imagenet256_loop` is the config's
loop of blocks instead: XLA for CPU copies every block's kernels out of their
stack there, and fills the stacks of what it keeps with zeros first. Ours and
PyTorch's states take turns in memory where they do not fit together. What the
products of matrices alone account for: benchmarks/products.py.

Peak memory is that of a process which only trains, with the loop of blocks that
the config has, beside 20 bytes for each parameter (weight, gradient, two
moments, average) and what `remat` keeps of the activations; only of the latent
model, since XLA for CPU undoes recomputation outside of loops.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import pathlib
import sys
import tempfile

from absl import app, flags
from safetensors.numpy import load_file

from benchmarks import report, worker, yardstick

_CONFIGS = flags.DEFINE_list(
  "configs", ["imagenet256", "ffhq64", "cifar10", "digits"], "To measure."
)
_DEPTH = flags.DEFINE_integer("depth", 28, "Blocks of imagenet256.", 1)
_BATCH = flags.DEFINE_integer("batch_size", 4, "Images per step.", 1)
_TURNS = flags.DEFINE_integer("turns", 5, "Measured turns, after one.", 1)
_STEPS = flags.DEFINE_bool("steps", True, "Measure train steps, too.")
_REMATS = flags.DEFINE_list(
  "remats", ["none", "dots"], "Of the peak memory of imagenet256's train step."
)


SHORT_CONFIGS = ("imagenet256", "ffhq64", "digits")
SHORT_DEPTH = 4


@dataclasses.dataclass(frozen=True)
class Case:
  """One config as it is measured.

  Attributes:
    name: for the table.
    config: file of configs/ and variants.
    fields: changed in the config.
    sizes: of PyTorch's network; None where it has none.
    is_shallow: whether gradients are compared.
  """

  name: str
  config: str
  fields: dict
  sizes: dict | None = None
  is_shallow: bool = True


def make_case(name: str, depth: int, batch_size: int) -> Case:
  fields = {"batch_size": batch_size}
  if name in ("imagenet256", "imagenet256_loop"):
    latent = dict(side=32, width=1152, depth=depth, num_heads=16)
    fields |= {"model.depth": depth, "model.remat": "none"}
    return Case(
      f"{name}, depth {depth}",
      "imagenet256:precision=paper",
      fields | {"model.scan_blocks": name.endswith("loop")},
      dict(kind="latent", num_classes=1000, **latent),
      is_shallow=depth <= SHORT_DEPTH,
    )
  if name == "ffhq64":
    image = dict(side=64, base=128, mult=[1, 2, 2, 2], depth=4, window=8)
    sizes = dict(kind="image", dropout=0.05, **image)
    return Case(name, name, fields, sizes)
  return Case(name, name, fields)


def measure(case: Case, torch: Callable | None, turns: int) -> dict:
  """One row of the table of times."""
  torch = torch if case.sizes else None
  with (
    worker.start(sys.executable, "benchmarks.train_worker") as (_, ours),
    tempfile.TemporaryDirectory() as folder,
  ):
    about = ours("load", config=case.config, fields=case.fields)
    forwards = {"ours": functools.partial(ours, "forward")}
    steps = {"ours": functools.partial(ours, "step")}
    off = None
    if torch:
      inputs = str(pathlib.Path(folder, "inputs"))
      off = check(case, ours, torch, pathlib.Path(folder))
      for name in yardstick.ATTENTIONS:
        shared = dict(inputs=inputs, attention=name)
        forwards[name] = functools.partial(torch, "forward", **shared)
        steps[name] = functools.partial(
          torch, "step", lr=3e-4, decay=0.9999, **shared
        )
    else:
      ours("use")
    times = {"forward": report.in_turns(forwards, turns)}
    if _STEPS.value:
      size = 20 * about["parameters"] + about["kept_bytes"]
      num_steps = min(turns, 3) if report.SHORT.value else turns
      times["step"] = step_times(ours, torch, steps, size, num_steps)
      if not report.SHORT.value:  # another program to compile
        ours("start")
        gradient = lambda: ours("loss_and_gradient")
        times["gradient"] = report.in_turns({"ours": gradient}, min(turns, 3))
    if torch:
      torch("free")
  return row(case, about, times, off)


def check(case: Case, ours, torch, folder: pathlib.Path) -> float:
  """Loads PyTorch's network with our weights; the largest difference."""
  path = lambda name: str(folder / name)
  ours(
    "export",
    weights=path("w.safetensors"),
    inputs=path("inputs"),
    outputs=path("ours"),
    gradient=case.is_shallow,
  )
  torch("load", path=path("w.safetensors"), **case.sizes)
  pathlib.Path(path("w.safetensors")).unlink()
  expected = load_file(path("ours"))
  off = []
  for name in yardstick.ATTENTIONS:
    shared = dict(inputs=path("inputs"), attention=name, output=path("its"))
    torch("forward", **shared)
    found = load_file(path("its"))
    if case.is_shallow:
      names = sorted(expected.keys() - {"out", "losses"})
      torch("gradient", names=names, **shared)
      found |= load_file(path("its"))
    off += [
      yardstick.check_equal(expected[key], found[key], f"{case.name}: {key}")
      for key in expected
    ]
  return max(off)


def step_times(ours, torch, steps: dict, size: int, turns: int) -> dict:
  """Seconds of steps: in turns, or state after state if memory is short.

  Args:
    ours, torch: calls of the two workers.
    steps: name -> a call that makes one step.
    size: bytes of one state, its gradient and what is kept for it.
    turns: measured steps of each.
  """
  if not torch or 2.3 * size < available_bytes():
    ours("start")
    times = report.in_turns(steps, turns)
    ours("stop")
    if torch:
      torch("stop")
    return times
  own = {"ours": steps["ours"]}
  its = {name: call for name, call in steps.items() if name != "ours"}
  times = {name: [] for name in steps}
  for _ in range(math.ceil(turns / 2)):
    ours("start")
    rounds = report.in_turns(own, 2)
    ours("stop")
    rounds |= report.in_turns(its, 2)
    torch("stop")
    for name, values in rounds.items():
      times[name] += values
  return times


def available_bytes() -> int:
  """Memory that can be had, 0 where the system does not say."""
  try:
    with open("/proc/meminfo") as file:
      lines = [x for x in file if x.startswith("MemAvailable")]
  except OSError:
    return 0
  return int(lines[0].split()[1]) * 1024


def row(case: Case, about: dict, times: dict, off: float | None) -> dict:
  """Medians and ratios of one case."""
  columns = {
    "config": case.name,
    "batch": case.fields["batch_size"],
    "remat": about["remat"],
    "forward s": None,
    "loss and gradient s": None,
    "step s": None,
  }
  for what in ("forward", "step"):
    median = report.medians(times.get(what, {}))
    columns[f"{what} s"] = median.pop("ours", None)
    for name in yardstick.ATTENTIONS:
      columns[f"torch {name} {what} s"] = median.get(name)
    mine, best = columns[f"{what} s"], min(median.values(), default=None)
    columns[f"{what}: ours / faster torch"] = mine / best if best else None
  if "gradient" in times:
    columns["loss and gradient s"] = report.medians(times["gradient"])["ours"]
  return columns | {"largest difference": off}


def memory(case: Case, remat: str) -> dict:
  """Peak memory of two steps in a process of their own, beside its bound."""
  fields = case.fields | {"model.remat": remat, "model.scan_blocks": True}
  with worker.start(sys.executable, "benchmarks.train_worker") as (_, ours):
    about = ours("load", config=case.config, fields=fields)
    idle = ours("peak_bytes")
    ours("start")
    seconds = [ours("step") for _ in range(2)][-1]
    peak = ours("peak_bytes")
  gib = lambda amount: amount / 2**30
  bound = 20 * about["parameters"] + about["kept_bytes"]
  return {
    "config": case.name,
    "remat": remat,
    "parameters": about["parameters"],
    "20 bytes each, GiB": gib(20 * about["parameters"]),
    "kept for backward GiB": gib(about["kept_bytes"]),
    "peak GiB": gib(peak),
    "of it before the state": gib(idle),
    "peak / sum": peak / bound,
    "step s": seconds,
  }


def main(_) -> None:
  is_short = report.SHORT.value
  depth = SHORT_DEPTH if is_short else _DEPTH.value
  names = SHORT_CONFIGS if is_short else _CONFIGS.value
  # Convolutions take long: half the batch of ffhq64 keeps `make bench` short.
  batches = {"ffhq64": 2} if is_short else {}
  cases = [
    make_case(name, depth, batches.get(name, _BATCH.value)) for name in names
  ]
  tables = []
  with yardstick.start() as (about, torch):
    rows = [measure(case, torch, _TURNS.value) for case in cases]
    tables.append(report.Table("Forward pass and train step, float32", rows))
  rows = [
    memory(case, remat)
    for case in cases
    if case.name.startswith("imagenet256")
    for remat in (["dots"] if is_short else _REMATS.value)
  ]
  if rows:
    note = (
      "The peak includes what the process holds before the state (libraries,"
      " the compiler), which does not grow with the network."
    )
    title = "Peak memory of the train step's process"
    tables.append(report.Table(title, rows, [note]))
  rate = f"Products of float32 matrices: {report.matmul_rate():.0f} GFLOP/s."
  report.emit(tables, [about, rate])


if __name__ == "__main__":
  app.run(main)
