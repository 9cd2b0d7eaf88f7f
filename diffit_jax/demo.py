"""What `make demo` runs: digits in, trained model, samples and a score out.

The same calls as the entry points: prepare, train, sample, evaluate. The scores
are honest: an SVM fitted on one half of the real digits, whose accuracy on the
other half is printed beside, is asked which sampled digits it takes for the
class that was asked for; and a Fréchet distance to the real digits in the
hidden layer of another small classifier, which is no FID and compares with no
paper's number, stands beside that of as many real digits to the rest of them.
A finished run is sampled again; --fresh trains anew.
"""

import json
import os
import pathlib
import shutil
import time

from absl import flags
import numpy as np

from diffit_jax import cli, config_files

_FRESH = flags.DEFINE_bool("fresh", False, "Forget the run and train anew.")
_CONFIG = flags.DEFINE_enum(
  "config_name",
  "digits",
  ["digits", "digits_latent"],
  "The image-space model, or the latent one.",
)
_WORKDIR = cli.define_path(
  "workdir", "Folder of the run; default runs/<config_name>."
)
_CONFIG_ARG = flags.DEFINE_string(
  "variant", "", "Variants of the config, as debug."
)
_NUM = 500
_DISTANCE = "frechet_digits"
_CLOCK = "demo_train_seconds.json"


def main() -> int:
  from diffit_jax.parallel import platforms

  start = time.monotonic()
  platforms.wake()
  workdir = pathlib.Path(_WORKDIR.value or f"runs/{_CONFIG.value}")
  print(f"DiffiT on scikit-learn's digits, in {workdir}", flush=True)
  config = config_files.ours(_CONFIG.value).get_config(_CONFIG_ARG.value)
  if _FRESH.value:
    _forget(workdir)
  train_seconds = _train(config, workdir)

  from diffit_jax.autoencoder.codec import make_codec
  from diffit_jax.generation import job, weights
  from diffit_jax.parallel.mesh import make_mesh

  mesh = make_mesh()
  loaded = weights.from_workdir(workdir, mesh)
  if loaded.step < config.total_steps:  # the last checkpoint is damaged
    train_seconds = _train(config, workdir, is_finished=False)
    loaded = weights.from_workdir(workdir, mesh)
  shutil.rmtree(workdir / "demo", ignore_errors=True)
  result = job.sample_to_folder(
      loaded, mesh, workdir / "demo", num=_NUM, seed=0, labels="0-9",
      batch_size=100,
    codec=make_codec(loaded.config),
  )  # fmt: skip
  with np.load(result.npz, allow_pickle=False) as samples:
    recognised, recognised_real = score(samples["arr_0"], samples["arr_1"])
  found, real = frechet_distances(result.npz.parent, mesh)
  report = {
    "recognised": recognised,
    "recognised_real": recognised_real,
    "frechet_digits": found,
    "frechet_digits_real": real,
    "num_samples": _NUM,
    "train_seconds": round(train_seconds, 1),
    "train_steps": loaded.step,
    "total_seconds": round(time.monotonic() - start, 1),
    "grid": str(result.grid),
  }
  (workdir / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
  print(
    f"Fréchet distance to the real digits: {found:.3f} in the features of a"
    f" small classifier, not FID ({_NUM} real digits to the rest: {real:.3f})"
  )
  print(f"grid: {result.grid}")
  print(
    f"recognised: {recognised:.3f} of {_NUM} samples as the digit asked for"
    f" (real held-out digits: {recognised_real:.3f})"
  )
  return 0


def _train(
  config, workdir: pathlib.Path, is_finished: bool | None = None
) -> float:
  """Trains where the run is not finished; seconds of all its training.

  Args:
    config: config of the run.
    workdir: folder of the run.
    is_finished: None asks the names of its checkpoints.
  """
  from diffit_jax.run import workdir as workdir_lib
  from diffit_jax.run.checkpoint import list_steps

  clock = workdir / _CLOCK
  spent = _read_seconds(clock)
  workdir_lib.check(workdir, config)
  if is_finished is None:
    is_finished = list_steps(workdir)[-1:] == [config.total_steps]
  if is_finished:
    print(f"already trained: {config.total_steps} steps", flush=True)
    return spent
  from diffit_jax.data import preparation
  from diffit_jax.data.builders import digits
  from diffit_jax.generation.generator import make_grid_sampler
  from diffit_jax.training.loop import train

  data_dir = os.environ.get("TFDS_DATA_DIR") or str(workdir.parent / "data")
  preparation.prepare(**digits.recipe(), data_dir=data_dir)
  start = time.monotonic()
  try:
    train(config, workdir, data_dir, make_grid_sampler)
  finally:
    spent += time.monotonic() - start
    workdir_lib.write_whole(clock, json.dumps(spent).encode())
  return spent


def _read_seconds(clock: pathlib.Path) -> float:
  """Seconds of training so far; 0 where nobody measured them."""
  try:
    return float(json.loads(clock.read_text()))
  except (FileNotFoundError, ValueError, TypeError):
    return 0.0


def _forget(workdir: pathlib.Path) -> None:
  """Removes what a run of the demo writes, and nothing else."""
  folders = "checkpoints samples tensorboard evaluation demo damaged"
  for name in folders.split():
    shutil.rmtree(workdir / name, ignore_errors=True)
  for name in ("config.json", "demo.json", _CLOCK, "parameters.txt"):
    (workdir / name).unlink(missing_ok=True)


def score(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
  """Shares recognised by an SVM fitted on half of the real digits.

  Args:
    images: uint8 [n, 8, 8, 3] samples, gray.
    labels: [n] classes that were asked for.

  Returns:
    (share of samples recognised as asked, share of held-out real digits).
  """
  from sklearn import datasets, model_selection, svm

  real = datasets.load_digits()
  to_uint8 = lambda x: np.round(x * (255 / 16))
  x_fit, x_held, y_fit, y_held = model_selection.train_test_split(
    to_uint8(real.data) / 255,
    real.target,
    test_size=0.5,
    stratify=real.target,
    random_state=0,
  )
  classifier = svm.SVC(gamma="scale", C=10.0).fit(x_fit, y_fit)
  samples = images[..., 0].reshape(len(images), -1) / 255
  return (
    float(np.mean(classifier.predict(samples) == labels)),
    float(classifier.score(x_held, y_held)),
  )


def frechet_distances(folder: pathlib.Path, mesh) -> tuple[float, float]:
  """How far samples, and as many real digits, are from the real digits.

  Args:
    folder: folder of the samples; gets their card.
    mesh: the devices.

  Returns:
    (distance of the samples to all real digits, distance of 500 real digits to
    the others), in `evaluation.spaces.digits_space`.
  """
  from sklearn import datasets

  from diffit_jax.evaluation import card, scoring
  from diffit_jax.evaluation.collector import Collector
  from diffit_jax.evaluation.features import spaces
  from diffit_jax.evaluation.measure import make_measure
  from diffit_jax.evaluation.sets import opening
  from diffit_jax.evaluation.sets.references import read_reference
  from diffit_jax.evaluation.sets.samples import ImageSamples

  real = np.round(datasets.load_digits().images * (255 / 16)).astype(np.uint8)
  real = np.random.RandomState(0).permutation(real)[..., None]
  collector = Collector(spaces.digits_space(), mesh)

  def measure(samples, reference) -> dict:
    samples = ImageSamples(opening.open_images(samples))
    compared = make_measure(
      collector, read_reference(reference), samples.shape, wanted=[_DISTANCE]
    )
    return scoring.evaluate(compared, samples, num=_NUM)

  ours, theirs = measure(folder, real), measure(real[:_NUM], real[_NUM:])
  card.write(folder / "card.json", ours)
  return ours["metrics"][_DISTANCE], theirs["metrics"][_DISTANCE]


if __name__ == "__main__":
  cli.run(main)
