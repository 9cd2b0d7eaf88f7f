"""TMSA against its alternatives on digits: many short runs, a table, a plot.

  python -m benchmarks.replication [--out=runs/replication]
  python -m benchmarks.replication --only=window2,tmsa,window8    # Figure 8

Trains configs/digits.py once for every variant of VARIANTS and every seed, as
`diffit_jax.main` does, and scores samples of the averaged weights: the share
that a classifier fitted on real digits takes for the digit asked for, and the
Fréchet distance to the real digits in the features of another one. Samples are
class-conditional, without guidance, from the same initial noise in every run.
Equal steps, batch and data order per seed; parameters are as near to each other
as widths allow: an alternative with a smaller path for time gets a wider time
token (`fields` below).

A finished run is a file <out>/runs/<variant>-<seed>.json; a killed one goes on
from its last checkpoint when the same command is started again. At the end, and
of what is there so far, results.json, table.md and plot.png are written.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time

from absl import flags
import numpy as np

from benchmarks import replication_report as report
from configs import digits
from diffit_jax import cli, whole
from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped


@dataclasses.dataclass(frozen=True)
class Variant:
  """One way in which time meets attention, or one window.

  Attributes:
    name: of its runs and on the plot.
    item: of the paper.
    what: in words.
    arg: argument string of configs/digits.py.
    fields: of config.model, set so that the number of parameters is that of
      the default as nearly as it can be.
  """

  name: str
  item: str
  what: str
  arg: str = ""
  fields: tuple[tuple[str, int], ...] = ()


WIDER = (("time_dim", 196),)  # of 128
VARIANTS = (
  Variant("tmsa", "T6 H, T7, T8, Fig. 8", "TMSA, window 4: the default"),
  Variant("rpb_time", "T6 F", "time in the bias alone", "time_in=rpb_time"),
  Variant("mlp_time", "T6 G", "time in the MLP", "time_in=mlp_time", WIDER),
  Variant("separate", "T7", "time apart", "time_in=separate", WIDER),
  Variant("fourier", "T8", "Fourier embedding", "embedding=fourier"),
  Variant("window2", "Fig. 8", "TMSA, window 2", "window=2"),
  Variant("window8", "Fig. 8", "TMSA, window 8: global", "window=8"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What runs must share to stand in one table.

  Attributes:
    steps: of training.
    num: samples that score a run.
    debug: a network too small to learn, for trying the program.
  """

  steps: int = 400
  num: int = 1000
  debug: bool = False


def main() -> int:
  given = flags.FLAGS
  run_all(
    choose(given.only),
    given.seeds,
    Settings(given.steps, given.num, given.debug),
    pathlib.Path(given.out),
    given.max_runs,
  )
  return 0


def choose(names: Sequence[str]) -> list[Variant]:
  """Variants by name, in the order of the table; all for no names."""
  known = [variant.name for variant in VARIANTS]
  unknown = [name for name in names if name not in known]
  if unknown:
    raise UserError(f"--only={unknown[0]}: use some of {', '.join(known)}")
  return [v for v in VARIANTS if not names or v.name in names]


def run_all(
  chosen: Sequence[Variant],
  seeds: int,
  settings: Settings,
  out: pathlib.Path,
  max_runs: int | None = None,
) -> None:
  """Makes what is missing, and the report.

  Raises:
    Stopped: some is missing still, as where SIGTERM came.
  """
  made, stopped, runs = 0, False, []
  for seed in range(seeds):
    for variant in chosen:
      path = out / "runs" / f"{variant.name}-{seed}.json"
      if not path.exists() and not stopped and made != max_runs:
        try:
          run(variant, seed, settings, path)
        except Stopped:
          stopped = True
        made += 1
      if path.exists():
        runs.append(read(path, settings))
  if runs:
    report.write(runs, out, VARIANTS)
  if len(runs) < seeds * len(chosen):
    raise Stopped


def read(path: pathlib.Path, settings: Settings) -> dict:
  """A finished run; refuses one of other settings."""
  try:
    found = json.loads(path.read_text())
    made_with = found["settings"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged: delete it to run it again") from error
  if made_with != dataclasses.asdict(settings):
    raise UserError(
      f"{path} was made with {made_with}, and these are {settings}:"
      " use another --out"
    )
  return found


def make_config(variant: Variant, seed: int, settings: Settings):
  """The digits' config for one run."""
  debug = ("debug",) if settings.debug else ()
  config = digits.get_config(",".join(filter(None, (variant.arg, *debug))))
  config.model.update(dict(variant.fields))
  config.seed = seed
  config.total_steps = settings.steps
  config.sample_every_steps = 0
  config.save_every_steps = max(settings.steps // 2, 1)
  config.log_every_steps = max(settings.steps // 10, 1)
  config.sampler.guidance_scale = 1.0
  return config


def run(
  variant: Variant, seed: int, settings: Settings, path: pathlib.Path
) -> None:
  """Trains and scores one run into `path`, or raises Stopped."""
  from benchmarks.report import machine
  from diffit_jax.data import preparation
  from diffit_jax.data.builders import digits as builder
  from diffit_jax.training.loop import train

  start = time.monotonic()
  config = make_config(variant, seed, settings)
  workdir = path.with_suffix("")
  data_dir = os.environ.get("TFDS_DATA_DIR") or str(path.parent.parent / "data")
  preparation.prepare(**builder.recipe(), data_dir=data_dir)
  train(config, workdir, data_dir)
  train_seconds = time.monotonic() - start
  found = {
    "variant": variant.name,
    "config": f"configs/digits.py:{variant.arg}".removesuffix(":"),
    "fields": dict(variant.fields),
    "seed": seed,
    "settings": dataclasses.asdict(settings),
    **score(variant, settings, workdir, data_dir),
    "train_seconds": round(train_seconds, 1),
    "seconds": round(time.monotonic() - start, 1),
    "machine": machine(),
  }
  with whole.writing(path) as partial:
    partial.write_text(json.dumps(found, indent=2) + "\n")
  print(
    f"{path.stem}: {', '.join(f'{k} {found[k]:.3f}' for k in report.SCORES)}"
    f" ({found['seconds']:.0f} s)",
    flush=True,
  )


def score(
  variant: Variant, settings: Settings, workdir: pathlib.Path, data_dir: str
) -> dict:
  """The scores of a trained run, and its number of parameters."""
  import jax

  from diffit_jax import demo
  from diffit_jax.evaluation import scoring
  from diffit_jax.evaluation.sets import opening
  from diffit_jax.evaluation.sets.samples import ImageSamples
  from diffit_jax.generation import weights
  from diffit_jax.parallel.mesh import make_mesh
  from diffit_jax.run import storage

  loaded = weights.from_workdir(workdir, make_mesh())
  log = storage.read_note(
    storage.absolute(workdir) / "checkpoints", loaded.step, "last_log"
  )
  index = np.arange(settings.num, dtype=np.uint32)
  labels = (index % 10).astype(np.int32)
  made = np.asarray(
    generator(variant, settings)(loaded.params, 0, index, labels)
  )
  recognised, recognised_real = demo.score(made, labels)
  card = scoring.evaluate(
    measure(data_dir), ImageSamples(opening.open_images(made)), num=len(made)
  )
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    "loss": log["loss"],
    "recognised": recognised,
    "recognised_real": recognised_real,
    "frechet_digits": card["metrics"]["frechet_digits"],
  }


@functools.cache
def measure(data_dir: str):
  """The Fréchet distance to the real digits."""
  from diffit_jax.evaluation import measure as measure_lib
  from diffit_jax.evaluation.collector import Collector
  from diffit_jax.evaluation.features import spaces
  from diffit_jax.evaluation.sets import references
  from diffit_jax.parallel.mesh import make_mesh

  return measure_lib.make_measure(
    Collector(spaces.open_space("digits"), make_mesh(), batch_size=200),
    references.read_reference("digits", data_dir, "train"),
    (8, 8),
    wanted=["frechet_digits"],
  )


@functools.cache
def generator(variant: Variant, settings: Settings):
  """The sampler, compiled once for all seeds of a variant."""
  from diffit_jax import models
  from diffit_jax.generation.generator import make_generator
  from diffit_jax.parallel.mesh import make_mesh

  config = make_config(variant, 0, settings)
  return make_generator(models.make_model(config.model), config, make_mesh())


if __name__ == "__main__":
  cli.define_path("out", "Folder of all runs.", "runs/replication")
  flags.DEFINE_list("only", [], "Variants; default all.")
  flags.DEFINE_integer("seeds", 3, "Runs of each variant.", 1)
  flags.DEFINE_integer("steps", Settings.steps, "Of training.", 1)
  flags.DEFINE_integer("num", Settings.num, "Samples that score a run.", 2)
  flags.DEFINE_integer(
    "max_runs", None, "Stop after so many more; start again to go on.", 1
  )
  flags.DEFINE_bool("debug", False, "A network too small to learn.")
  cli.run(main)
