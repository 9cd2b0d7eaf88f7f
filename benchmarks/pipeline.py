"""Images per second that the data pipeline delivers, nothing else running.

  python benchmarks/pipeline.py [--threads=1,2,4] [--resolution=64] [--json=F]

Crops of the two photographs inside scikit-learn are prepared once in each
encoding, in a temporary folder that the operating system keeps in memory. Turns
go round all encodings and numbers of threads; medians are printed. CPU time is
that of the whole process for one image, which a busy machine disturbs less.
"""

import json
import os
import pathlib
import platform
import statistics
import tempfile
import time

from absl import app, flags
import grain
import numpy as np
from PIL import Image
from sklearn import datasets

from diffit_jax.data import pipeline, preparation, transforms
from diffit_jax.data.builders import image_folder

_THREADS = flags.DEFINE_list("threads", ["1", "2", "4", "8"], "To measure.")
_ENCODINGS = flags.DEFINE_list("encodings", ["raw", "png"], "To measure.")
_RESOLUTION = flags.DEFINE_integer("resolution", 64, "Side of the images.", 1)
_NUM = flags.DEFINE_integer("num", 2000, "Images in the data set.", 1)
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images per batch.", 1)
_FLIP = flags.DEFINE_boolean("flip", True, "Whether half of them are mirrored.")
_TURNS = flags.DEFINE_integer("turns", 5, "Measured turns, after one.", 1)
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Of each measurement.", 0)
_JSON = flags.DEFINE_string("json", None, "Also write the rows to this file.")


def write_photographs(folder: pathlib.Path, num: int, resolution: int) -> None:
  """Writes `num` square crops of photographs, brought to one size."""
  photographs = datasets.load_sample_images().images
  rng = np.random.default_rng(0)
  for number in range(num):
    pixels = photographs[number % len(photographs)]
    height, width, _ = pixels.shape
    side = int(rng.integers(100, 400))
    top, left = rng.integers(height - side), rng.integers(width - side)
    crop = Image.fromarray(pixels[top : top + side, left : left + side])
    crop = transforms.resize_edm(crop, resolution)
    crop.save(folder / f"{number:06d}.png", compress_level=1)


def prepare(root: pathlib.Path, encoding: str) -> pipeline.Dataset:
  """The photographs of `root` as a data set in one encoding."""
  recipe = image_folder.recipe(
    str(root / "photographs"),
    name=encoding,
    resolution=_RESOLUTION.value,
    encoding=encoding,
  )
  preparation.prepare(**recipe, data_dir=str(root))
  return pipeline.open_dataset(encoding, str(root))


def measure(dataset: pipeline.Dataset, num_threads: int) -> tuple[float, float]:
  """Images per second, and CPU seconds per image, once it is under way."""
  batches = pipeline.Pipeline(
    dataset,
    global_batch_size=_BATCH.value,
    seed=0,
    flip=_FLIP.value,
    num_threads=num_threads,
  )
  with batches:
    for _ in range(10):  # more than are kept ready
      next(batches)
    num, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < _SECONDS.value:
      num += len(next(batches)["index"])
    seconds = time.perf_counter() - wall
    return num / seconds, (time.process_time() - cpu) / num


def measure_all(root: pathlib.Path) -> list[dict]:
  """One row for each encoding and number of threads."""
  (root / "photographs").mkdir()
  write_photographs(root / "photographs", _NUM.value, _RESOLUTION.value)
  sets = {encoding: prepare(root, encoding) for encoding in _ENCODINGS.value}
  cases = [(e, int(t)) for e in sets for t in _THREADS.value]
  results = {case: [] for case in cases}
  for turn in range(_TURNS.value + 1):
    for encoding, num_threads in cases:
      result = measure(sets[encoding], num_threads)
      if turn:  # the first one reads from the disk
        results[encoding, num_threads].append(result)
  rows = []
  for (encoding, num_threads), measured in results.items():
    rates, costs = zip(*measured)
    files = pathlib.Path(sets[encoding].directory).glob("*array_record*")
    rows.append(
      {
        "encoding": encoding,
        "threads": num_threads,
        "images_per_second": statistics.median(rates),
        "slowest_turn": min(rates),
        "fastest_turn": max(rates),
        "cpu_microseconds": statistics.median(costs) * 1e6,
        "disk_bytes": sum(file.stat().st_size for file in files) / _NUM.value,
      }
    )
  return rows


def main(_) -> None:
  with tempfile.TemporaryDirectory() as folder:
    rows = measure_all(pathlib.Path(folder))
  print(
    f"{_RESOLUTION.value}x{_RESOLUTION.value}, batch {_BATCH.value}, median"
    f" (slowest to fastest) of {_TURNS.value} turns, {platform.machine()},"
    f" {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, grain"
    f" {grain.__version__}"
  )
  print("| encoding | threads | images/s | | CPU us/image | bytes/image |")
  print("|---|---|---|---|---|---|")
  for row in rows:
    print(
      f"| {row['encoding']} | {row['threads']}"
      f" | {row['images_per_second']:,.0f}"
      f" | {row['slowest_turn']:,.0f} to {row['fastest_turn']:,.0f}"
      f" | {row['cpu_microseconds']:.0f} | {row['disk_bytes']:,.0f} |"
    )
  if _JSON.value:
    with open(_JSON.value, "w") as file:
      json.dump(rows, file, indent=2)


if __name__ == "__main__":
  app.run(main)
