"""Seconds and memory of the metrics on features of noise.

  python -m benchmarks.metrics [--num=50000] [--dim=2048] [--skip_slow]
      [--json=FILE]

Each row runs in a process of its own, so that its peak memory is its own: what
the process reached above what it held just before. Beside ours stand the plain
forms: `sqrtm` is the matrix root of scipy in place of singular values, `naive`
all pairs at once in numpy, and `tiled` the same small sets by ours. Rows of the
plain forms are left out by --skip_slow; --short takes less of everything.
"""

import json
import resource
import subprocess
import sys
import time

from absl import app, flags
import numpy as np

from benchmarks import report

_NUM = flags.DEFINE_integer("num", 50_000, "Samples.", 8)
_REFERENCE = flags.DEFINE_integer("reference", 10_000, "The smaller set.", 8)
_NAIVE = flags.DEFINE_integer("naive", 5_000, "Points of the naive form.", 8)
_DIM = flags.DEFINE_integer("dim", 2048, "Dimensions of a feature.", 1)
_CLASSES = flags.DEFINE_integer("classes", 1008, "Classes of the logits.", 2)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Features of an update.", 1)
_SLOW = flags.DEFINE_bool("skip_slow", False, "Leave the plain forms out.")
_ONE = flags.DEFINE_string("one", None, "Used by the program itself.")

SHORT = ("--num=5000", "--reference=2000", "--naive=1000", "--dim=512")


def noise(num: int, dim: int, seed: int) -> np.ndarray:
  """[num, dim] float32, of deviations that fall as 1 / sqrt(1 + i)."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((num, dim), np.float32)
  x /= np.sqrt(np.arange(1, dim + 1, dtype=np.float32))
  return x + np.float32(0.02 * seed)


def moments_of(x: np.ndarray):
  """Mean and covariance of x, in batches as an extractor gives them."""
  from diffit_jax.evaluation.metrics.moments import Moments

  moments = Moments(x.shape[1])
  for start in range(0, len(x), _BATCH.value):
    moments.update(x[start : start + _BATCH.value])
  return moments.mean, moments.covariance()


def frechet_by_sqrtm(mu1, sigma1, mu2, sigma2) -> float:
  """The usual form, with scipy's matrix root."""
  from scipy import linalg

  root = np.real(linalg.sqrtm(sigma1 @ sigma2))
  return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)


def naive_precision_recall(reference, samples, k=3):
  """All pairs at once, in float32."""

  def pairs(x, y):
    norms = (x**2).sum(1)[:, None] + (y**2).sum(1)
    return np.maximum(norms - 2 * x @ y.T, 0)

  radii = lambda x: np.sort(pairs(x, x), axis=1)[:, k]
  d2 = pairs(reference, samples)
  precision = (d2 <= radii(reference)[:, None]).any(0).mean()
  return precision, (d2 <= radii(samples)).any(1).mean()


def cases() -> dict:
  """Row name -> (makes its inputs, is measured on them, is a plain form)."""
  from diffit_jax.evaluation import metrics

  num, dim = _NUM.value, _DIM.value
  sets = lambda n, m: lambda: (noise(n, dim, 0), noise(m, dim, 1))
  small = sets(_NAIVE.value, _NAIVE.value)
  moments = lambda: (
    *moments_of(noise(2 * dim, dim, 0)),
    *moments_of(noise(2 * dim, dim, 1)),
  )
  fid = lambda x, y: metrics.frechet_distance(*moments_of(x), *moments_of(y))
  logits = lambda: (4 * noise(num, _CLASSES.value, 0),)
  return {
    f"moments, {num}": (
      lambda: (noise(num, dim, 0),),
      lambda x: moments_of(x)[1].trace(),
      False,
    ),
    "FID, of moments": (moments, metrics.frechet_distance, False),
    "FID, of moments, sqrtm": (moments, frechet_by_sqrtm, True),
    f"FID, whole, {num} x 2": (sets(num, num), fid, False),
    f"precision/recall, {_REFERENCE.value}, {num}": (
      sets(_REFERENCE.value, num),
      metrics.precision_recall,
      False,
    ),
    f"precision/recall, {num} x 2": (
      sets(num, num),
      metrics.precision_recall,
      False,
    ),
    f"precision/recall, {_NAIVE.value} x 2, tiled": (
      small,
      metrics.precision_recall,
      False,
    ),
    f"precision/recall, {_NAIVE.value} x 2, naive": (
      small,
      naive_precision_recall,
      True,
    ),
    f"inception score, {num}": (logits, metrics.inception_score, False),
    f"KID, {_REFERENCE.value}, {num}": (
      sets(_REFERENCE.value, num),
      metrics.kernel_inception_distance,
      False,
    ),
    f"KID, {num} x 2": (
      sets(num, num),
      metrics.kernel_inception_distance,
      False,
    ),
  }


def memory(field: str) -> float:
  """GiB of this process, by a field of /proc/self/status."""
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith(field))
  return int(line.split()[1]) / 2**20


def measure(name: str) -> dict:
  """One row of the table, in this process."""
  import jax

  make, run, _ = cases()[name]
  jax.devices()  # its start is not the metric's
  inputs = make()
  before = memory("VmRSS:")
  # The peak so far may be that of making the inputs: forget it where possible.
  try:
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
  except OSError:
    pass
  start = time.perf_counter()
  value = run(*inputs)
  seconds = time.perf_counter() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  return {
    "metric": name,
    "seconds": seconds,
    "inputs GiB": sum(a.nbytes for a in inputs) / 2**30,
    "added GiB": memory("VmHWM:") - before,
    "peak GiB": max(peak, memory("VmHWM:")),
    "value": ", ".join(f"{v:.8g}" for v in np.atleast_1d(value)),
  }


def measure_apart(name: str) -> dict:
  """The same in a process of its own."""
  given = SHORT if report.SHORT.value else sys.argv[1:]
  command = [sys.executable, "-m", "benchmarks.metrics", *given]
  done = subprocess.run(
    [*command, f"--one={name}"],
    cwd=report.ROOT,
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main(_) -> None:
  if _ONE.value:
    print(json.dumps(measure(_ONE.value)))
    return
  if report.SHORT.value:
    flags.FLAGS(sys.argv[:1] + list(SHORT))
  rows = [
    measure_apart(name)
    for name, (_, _, is_plain) in cases().items()
    if not (is_plain and _SLOW.value)
  ]
  title = f"Metrics of features with {_DIM.value} dimensions"
  packages = (*report.PACKAGES, "scipy")
  report.emit([report.Table(title, rows)], packages=packages)


if __name__ == "__main__":
  app.run(main)
