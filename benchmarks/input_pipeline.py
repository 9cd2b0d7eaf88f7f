"""Images per second that the data pipeline delivers, nothing else running.

  python -m benchmarks.input_pipeline [--threads=1,2,4] [--resolution=64]
      [--json=FILE]

Crops of the two photographs inside scikit-learn are prepared once in each
encoding, in a temporary folder that the operating system keeps in memory. Turns
go round all encodings and numbers of threads; rates are medians. CPU time is
that of the whole process for one image, which a busy machine disturbs less.
"""

import pathlib
import statistics
import tempfile
import time

from absl import app, flags
import numpy as np
from PIL import Image
from sklearn import datasets

from benchmarks import report
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
SHORT_THREADS = ("1", "4")
SHORT_TURNS = 3


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


def measure_all(root: pathlib.Path, threads, num_turns: int) -> list[dict]:
  """One row for each encoding and number of threads."""
  (root / "photographs").mkdir()
  write_photographs(root / "photographs", _NUM.value, _RESOLUTION.value)
  sets = {encoding: prepare(root, encoding) for encoding in _ENCODINGS.value}
  cases = [(e, int(t)) for e in sets for t in threads]
  results = {case: [] for case in cases}
  for turn in range(num_turns + 1):
    for encoding, num_threads in cases:
      result = measure(sets[encoding], num_threads)
      if turn:  # the first one reads from the disk
        results[encoding, num_threads].append(result)
  rows = []
  for (encoding, num_threads), measured in results.items():
    rates, costs = zip(*measured)
    files = pathlib.Path(sets[encoding].directory).glob("*array_record*")
    size = sum(file.stat().st_size for file in files)
    rows.append(
      {
        "encoding": encoding,
        "threads": num_threads,
        "images/s": statistics.median(rates),
        "slowest to fastest turn": report.spread(rates),
        "CPU us/image": 1e6 * statistics.median(costs),
        "bytes/image": round(size / _NUM.value),
      }
    )
  return rows


def main(_) -> None:
  is_short = report.SHORT.value
  threads = SHORT_THREADS if is_short else _THREADS.value
  num_turns = SHORT_TURNS if is_short else _TURNS.value
  with tempfile.TemporaryDirectory() as folder:
    rows = measure_all(pathlib.Path(folder), threads, num_turns)
  side = _RESOLUTION.value
  title = f"Images of {side}x{side} in batches of {_BATCH.value}"
  flipped = ", half of them mirrored" if _FLIP.value else ""
  packages = (*report.PACKAGES, "grain")
  report.emit([report.Table(title + flipped, rows)], packages=packages)


if __name__ == "__main__":
  app.run(main)
