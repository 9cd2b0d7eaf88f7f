"""What guidance may leave out, and how soon each solver converges.

  python -m benchmarks.sampling [--latent_workdir=runs/digits_latent]
      [--image_workdir=runs/digits] [--plot=FILE.png] [--json=FILE]

On models trained on scikit-learn's digits; without a finished run, such as the
demo's, one of a few hundred steps is trained first. All runs of a model start
from the same noise. Distances are between images with values in [-1, 1];
"recognised" is the demo's share of samples that an SVM takes for the class that
was asked for.
"""

import dataclasses
import functools
import importlib
import pathlib

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from diffit_jax import cli, demo, models, sampling
from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.data import preparation
from diffit_jax.data.builders import digits
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.environment import PRNG
from diffit_jax.generation import generator, weights
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.pictures import to_uint8
from diffit_jax.run.checkpoint import list_steps
from diffit_jax.training import loop

_LATENT = cli.define_path(
  "latent_workdir", "Run of digits_latent.", "runs/bench_digits_latent"
)
_IMAGE = cli.define_path("image_workdir", "Run of digits.", "runs/bench_digits")
_NUM = flags.DEFINE_integer("num", 100, "Samples of each run.", 1)
_TURNS = flags.DEFINE_integer("turns", 5, "Measured turns, after one.", 1)
_PLOT = cli.define_path(
  "plot", "PNG for the curves; docs/sampling.png with --short."
)
TRAIN_STEPS = {"digits_latent": 600, "digits": 200}  # a minute or so each

# The paper's sampler (configs/imagenet256.py).
PRESET = Guidance(4.4, schedule="power_cosine", power=4.0, channels=3)
TOLERANCES = (0.0, 1e-4, 1e-3, 3e-3, 6e-3, 1e-2)
SHORT_TOLERANCES = (0.0, 1e-3, 6e-3)
# name -> (solver, its options)
ADM_SOLVERS = {
  "ddim": ("ddim", {}),
  "dpmpp_2m": ("dpmpp_2m", {}),
  "unipc": ("unipc", {}),
  "unipc, order 3": ("unipc", {"order": 3}),
}
STEPS = (5, 8, 10, 15, 20, 25, 35, 50, 100, 250)
HEUN_STEPS = (3, 5, 8, 13, 18, 25, 50)
SHORT_STEPS = (5, 10, 25, 100)
SHORT_HEUN_STEPS = (3, 5, 13, 25)
LAST = 1000


@dataclasses.dataclass
class Model:
  """A trained model, with noise and labels for a batch of samples."""

  loaded: weights.Weights
  noise: jax.Array
  labels: jax.Array

  @classmethod
  def load(cls, workdir: str, num: int) -> "Model":
    loaded = weights.from_workdir(workdir, make_mesh())
    config = loaded.config
    side, channels = config.data.resolution, config.model.channels
    key = jax.random.key(0, impl=PRNG)
    noise = jax.random.normal(key, (num, side, side, channels))
    return cls(loaded, noise, jnp.arange(num) % config.data.num_classes)

  def sampler(
    self, solver: str, steps: int, cfg: Guidance, skip=None, **options
  ):
    """A jitted () -> images [n, h, w, 3] in [-1, 1]."""
    config = self.loaded.config
    model = models.make_model(config.model)
    codec = make_codec(config)

    def run(params, noise, labels, keys):
      with jax.default_matmul_precision(config.matmul_precision):
        network = generator.make_network(model, params, config)
        guided = lambda cfg: cfg.denoiser(network, labels, model.num_classes)
        x = sampling.sample(
          guided(cfg),
          solver,
          noise,
          steps=steps,
          keys=keys,
          plain=guided(Guidance()) if skip else None,
          skip=skip,
          **options,
        )
      return x if codec is None else codec.decode_fn(codec.params, x)

    keys = jax.random.split(jax.random.key(1, impl=PRNG), len(self.noise))
    run = jax.jit(run)
    return lambda: run(self.loaded.params, self.noise, self.labels, keys)

  def recognised(self, images) -> float:
    return demo.score(to_uint8(np.asarray(images)), np.asarray(self.labels))[0]


def ensure_trained(name: str, workdir: str) -> None:
  """Trains configs/`name` for TRAIN_STEPS where `workdir` holds no run."""
  if list_steps(workdir):
    return
  config = importlib.import_module(f"configs.{name}").get_config()
  config.total_steps = config.save_every_steps = TRAIN_STEPS[name]
  config.sample_every_steps = config.keep_every_steps = 0
  data_dir = f"{workdir}/data"
  preparation.prepare(**digits.recipe(), data_dir=data_dir)
  loop.train(config, workdir, data_dir)


def guidance_table(model: Model, tolerances, turns: int) -> report.Table:
  """The paper's 250 steps, always guided and where guidance matters."""
  runs = {"always": model.sampler("ddpm", 250, PRESET)}
  skipped = {"always": 0}
  for tolerance in tolerances:
    skip = dataclasses.replace(PRESET, tolerance=tolerance).skippable
    runs[tolerance] = model.sampler("ddpm", 250, PRESET, skip)
    skipped[tolerance] = sampling.make_solver("ddpm", 250).num_skipped(skip)
  pixels = lambda images: np.asarray(images) / 2  # a range of 1
  whole = pixels(runs["always"]())
  off = {n: np.abs(pixels(run()) - whole).max() for n, run in runs.items()}
  times = report.medians(
    report.in_turns(
      {n: functools.partial(report.seconds, run) for n, run in runs.items()},
      turns,
    )
  )
  rows = [
    {
      "guided where scale is off 1 by more than": name,
      "network rows per sample": 500 - skipped[name],
      "work": (500 - skipped[name]) / 500,
      "seconds": times[name],
      "time": times[name] / times["always"],
      "largest change of a pixel in 0..1": float(off[name]),
    }
    for name in runs
  ]
  fits = [r for r in rows if r["largest change of a pixel in 0..1"] < 1e-3]
  best = min(fits, key=lambda row: row["work"])
  note = (
    f"Least work for a change below 1e-3: {best['work']:.3f}, with"
    f" guidance_tolerance={best[next(iter(best))]}."
  )
  return report.Table(
    f"250 DDPM steps, power-cosine guidance up to {PRESET.scale},"
    f" {len(model.noise)} samples",
    rows,
    [note],
  )


def curve(model: Model, name: str, solver: str, options, steps, cfg, reference):
  """Rows of one solver."""
  rows = []
  for n in steps:
    images = np.asarray(model.sampler(solver, n, cfg, **options)())
    off = images - reference
    rows.append(
      {
        "solver": name,
        "steps": n,
        "evaluations": sampling.make_solver(
          solver, n, **options
        ).num_evaluations,
        "rms distance": float(np.sqrt(np.mean(off**2))),
        "largest": float(np.abs(off).max()),
        "recognised": model.recognised(images),
      }
    )
  return rows


def latent_table(model: Model, steps) -> report.Table:
  """The deterministic solvers of ADM's diffusion, and DDPM's recognised share.

  The reference takes all 1,000 steps with the solver whose order is highest.
  """
  options = SamplerOptions.from_config(model.loaded.config)
  cfg = options.guidance
  run = model.sampler("unipc", LAST, cfg, order=3, spacing="uniform")
  reference = np.asarray(run())
  rows = []
  for name, (solver, extra) in ADM_SOLVERS.items():
    rows += curve(model, name, solver, extra, steps, cfg, reference)
  uniform = {"spacing": "uniform"}
  for name in ("ddim", "dpmpp_2m"):
    rows += curve(model, name, name, uniform, (LAST,), cfg, reference)
  ancestral = curve(model, "ddpm", "ddpm", {}, (25, 250), cfg, reference)
  for row in ancestral:  # another noise, so other samples
    row["rms distance"] = row["largest"] = None
  find = lambda name, n: next(
    row["rms distance"]
    for row in rows
    if row["solver"] == name and row["steps"] == n
  )
  ddim = find("ddim", 100)
  note = (
    f"DPM-Solver++ at 25 steps is {find('dpmpp_2m', 25):.2e} from the converged"
    f" sample, UniPC {find('unipc', 25):.2e}, and DDIM at 100 steps {ddim:.2e}."
  )
  return report.Table(
    "Latent digits: distance to 1,000 steps of UniPC of order 3",
    rows + ancestral,
    [note],
  )


def image_table(model: Model, steps) -> report.Table:
  cfg = Guidance()
  reference = np.asarray(model.sampler("edm_heun", LAST, cfg)())
  rows = curve(model, "edm_heun", "edm_heun", {}, steps, cfg, reference)
  churned = curve(
    model, "edm_heun, S_churn=40", "edm_heun", {"S_churn": 40.0}, (18, 50), cfg,
    reference,
  )  # fmt: skip
  for row in churned:
    row["rms distance"] = row["largest"] = None
  return report.Table(
    "Image-space digits: distance to 1,000 steps of Heun (1,999 evaluations)",
    rows + churned,
  )


def plot(tables: list[report.Table], path: str) -> None:
  """Distance over evaluations, one line per solver."""
  from matplotlib import figure

  axes = (page := figure.Figure((7, 4.5), layout="constrained")).subplots()
  lines = {}
  for row in (row for table in tables for row in table.rows):
    if row["rms distance"] and row["steps"] < LAST:
      point = row["evaluations"], row["rms distance"]
      lines.setdefault(row["solver"], []).append(point)
  for name, points in lines.items():
    axes.loglog(*zip(*points), "o-", markersize=3, label=name)
  axes.set_xlabel("network evaluations")
  axes.set_ylabel("rms distance to 1,000 steps, images in [-1, 1]")
  axes.grid(which="both", alpha=0.3)
  axes.legend()
  page.savefig(path, dpi=120)


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
  is_short = report.SHORT.value
  num = 50 if is_short else _NUM.value
  ensure_trained("digits_latent", _LATENT.value)
  model = Model.load(_LATENT.value, num)
  tolerances = SHORT_TOLERANCES if is_short else TOLERANCES
  tables = [guidance_table(model, tolerances, 3 if is_short else _TURNS.value)]
  curves = [latent_table(model, SHORT_STEPS if is_short else STEPS)]
  notes = [f"Latent model: {model.loaded.source}."]
  ensure_trained("digits", _IMAGE.value)
  model = Model.load(_IMAGE.value, num)
  heun = SHORT_HEUN_STEPS if is_short else HEUN_STEPS
  curves.append(image_table(model, heun))
  notes.append(f"Image-space model: {model.loaded.source}.")
  path = _PLOT.value or (report.ROOT / "docs/sampling.png" if is_short else "")
  if path:
    plot(curves, path)
    notes.append(f"![Distance over evaluations]({pathlib.Path(path).name})")
  report.emit(tables + curves, notes)


if __name__ == "__main__":
  app.run(main)
