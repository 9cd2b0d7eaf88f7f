"""Seconds from the command to the first step, and where they go.

  python -m benchmarks.compile_time [--configs=digits,imagenet256,ffhq64]
      [--depth=4] [--turns=3] [--json=FILE]

Starts `diffit_jax.main` on a small data set of noise (digits are the real
ones), cold in a new workdir, then warm in the same one, whose compilation cache
is filled by then, and ends it after the first step. imagenet256 has fewer
blocks, since its state would not fit every machine; blocks are one scanned
program, so compiling hardly depends on their number, and making the state does.
Batches are small: only the run of the step depends on them. The second table
is the time of `--help`, once files are in memory.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import numpy as np
from PIL import Image

from benchmarks import first_step, report
from diffit_jax.data import preparation
from diffit_jax.data.builders import digits, image_folder, imagenet_latents

_CONFIGS = flags.DEFINE_list(
  "configs", ["digits", "imagenet256", "ffhq64"], "To start."
)
_DEPTH = flags.DEFINE_integer("depth", 4, "Blocks of imagenet256.", 1)
_TURNS = flags.DEFINE_integer("turns", 3, "Starts of each kind.", 1)

SHORT_CONFIGS = ("digits", "imagenet256")
ENTRIES = ("sample", "main", "evaluate", "export", "prepare", "plan")
BATCH = {"digits": 128, "imagenet256": 4, "ffhq64": 4}
_NUM_IMAGES = 16


def prepare_digits(folder: pathlib.Path) -> None:
  preparation.prepare(**digits.recipe(), data_dir=str(folder))


def prepare_ffhq64(folder: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  source = folder / "noise"
  source.mkdir()
  for number in range(_NUM_IMAGES):
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(source / f"{number:02d}.png")
  recipe = image_folder.recipe(str(source), name="ffhq64", resolution=64)
  preparation.prepare(**recipe, data_dir=str(folder))


def prepare_imagenet256(folder: pathlib.Path) -> None:
  """Latents that no VAE made."""
  rng = np.random.default_rng(0)
  noise = lambda x: rng.standard_normal((len(x), 32, 32, 4), np.float32)
  images = imagenet_latents.SourceImages(
    path="noise",
    num=_NUM_IMAGES,
    class_names=[str(label) for label in range(1000)],
    listing_hash="noise",
    name=lambda i: f"{i:02d}",
    read=lambda i: (rng.integers(0, 256, (256, 256, 3), np.uint8), i),
  )
  encoder = imagenet_latents.LatentEncoder(
    encode=lambda x: (noise(x), noise(x)),
    down_factor=8,
    in_channels=3,
    latent_channels=4,
    scaling_factor=0.18215,
    hash="noise",
    source="noise",
  )
  imagenet_latents.prepare(
    images,
    encoder,
    name="imagenet256_latents",
    data_dir=str(folder),
    resolution=256,
  )


PREPARE = {
  "digits": prepare_digits,
  "imagenet256": prepare_imagenet256,
  "ffhq64": prepare_ffhq64,
}


def start(name: str, workdir: pathlib.Path, data_dir: pathlib.Path) -> dict:
  """Seconds of each part of one start."""
  command = [sys.executable, "-m", "benchmarks.first_step"]
  command += [f"--config=configs/{name}.py", f"--workdir={workdir}"]
  command += [f"--data_dir={data_dir}", f"--config.batch_size={BATCH[name]}"]
  if name == "imagenet256":
    command.append(f"--config.model.depth={_DEPTH.value}")
  environment = os.environ | {first_step.START: repr(time.time())}
  done = subprocess.run(
    command,
    cwd=report.ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, turns: int) -> list[dict]:
  """Rows of one config: cold and warm."""
  parts = {"cold": [], "with the cache": []}
  with tempfile.TemporaryDirectory() as root:
    data_dir = pathlib.Path(root, "data")
    data_dir.mkdir()
    PREPARE[name](data_dir)
    for turn in range(turns):
      for kind in parts:
        workdir = pathlib.Path(root, f"run{turn}")
        parts[kind].append(start(name, workdir, data_dir))
  depth = f", depth {_DEPTH.value}" if name == "imagenet256" else ""
  rows = []
  for kind, found in parts.items():
    times = {part: [each[part] for each in found] for part in found[0]}
    medians = report.medians(times)
    about = {"config": name + depth, "batch": BATCH[name], "start": kind}
    about["total s"] = medians.pop("total")
    rows.append(about | {f"{part} s": took for part, took in medians.items()})
  return rows


def time_help(entry: str) -> float:
  command = [sys.executable, "-m", f"diffit_jax.{entry}", "--help"]
  begin = time.perf_counter()
  subprocess.run(
    command, cwd=report.ROOT, stdout=subprocess.DEVNULL, check=True
  )
  return time.perf_counter() - begin


def help_table(turns: int) -> report.Table:
  calls = {entry: functools.partial(time_help, entry) for entry in ENTRIES}
  times = report.in_turns(calls, turns)
  rows = [
    {
      "command": f"python -m diffit_jax.{entry} --help",
      "seconds": took,
      "fastest to slowest": report.spread(times[entry]),
    }
    for entry, took in report.medians(times).items()
  ]
  return report.Table("Entry points before they work", rows)


def main(_) -> None:
  is_short = report.SHORT.value
  names = SHORT_CONFIGS if is_short else _CONFIGS.value
  turns = 1 if is_short else _TURNS.value
  helped = help_table(5)  # before the machine is warm from compiling
  rows = [row for name in names for row in measure(name, turns)]
  title = f"From the command to the end of the first step, {turns} starts each"
  report.emit([report.Table(title, rows), helped])


if __name__ == "__main__":
  app.run(main)
