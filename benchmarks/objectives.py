"""What each objective trains on: its noise levels and what an error weighs.

  python -m benchmarks.objectives        # writes docs/objectives.png

Training draws of every row of `diffusion.kinds`, as the configs set it, put on
one axis: log-SNR = 2 ln(signal / noise) of what the network sees. The weight is
that of the squared error of the clean data, so that objectives that predict
different things can be compared; each is scaled to 1 at log-SNR 0.
"""

from absl import app
import jax
import numpy as np

from benchmarks import report
from diffit_jax import config_files
from diffit_jax.diffusion import adm, edm, flow, kinds
from diffit_jax.environment import PRNG

DRAWS = 200_000
ROWS = {  # name: (config, variants)
  "EDM (ffhq64)": ("ffhq64", None),
  "VP (cifar10_song)": ("cifar10_song", None),
  "VE (cifar10_song)": ("cifar10_song", "network=ncsnpp"),
  "ADM (imagenet256)": ("imagenet256", None),
  "flow": ("imagenet256", "objective=flow"),
  "flow, as SiT": ("imagenet256", "objective=sit"),
  "flow, as JiT": ("imagenet256", "objective=jit"),
}


def log_snr(diffusion, level: np.ndarray) -> np.ndarray:
  """2 ln(signal / noise) at levels of a row."""
  if isinstance(diffusion, edm.Process):
    return -2 * np.log(level)
  if isinstance(diffusion, adm.Schedule):
    t = level.astype(int)
    return 2 * np.log(diffusion.signal[t] / diffusion.sigma[t])
  return 2 * np.log((1 - level) / level)


def weight(diffusion, level: np.ndarray) -> np.ndarray:
  """Of the squared error of clean data, up to a factor."""
  if isinstance(diffusion, edm.Process):
    return np.asarray(diffusion.loss_weight(level))
  if isinstance(diffusion, adm.Schedule):  # of (2): the error of eps, squared
    return diffusion.eps_to_x0[level.astype(int)] ** -2
  own = np.asarray(diffusion.loss_weight(level))
  to_clean = flow.Flow(diffusion.prediction, "x").loss_weight(level)
  return own / np.asarray(to_clean)


def draws(diffusion) -> np.ndarray:
  keys = jax.random.split(jax.random.key(0, impl=PRNG), DRAWS)
  return np.asarray(jax.jit(diffusion.sample_level)(keys), np.float64)


def measured() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{name: (log-SNR, weight) of the draws, in order of log-SNR}."""
  found = {}
  for name, (file, variants) in ROWS.items():
    config = config_files.ours(file).get_config(variants)
    diffusion = kinds.make(config.diffusion)
    level = draws(diffusion)
    at, value = log_snr(diffusion, level), weight(diffusion, level)
    order = np.argsort(at)
    found[name] = at[order], value[order]
  return found


def plot(found, path) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.4), layout="constrained")
  FigureCanvasAgg(figure)
  density, weights = figure.subplots(1, 2)
  for name, (at, value) in found.items():
    counts, edges = np.histogram(at, 60, (-14, 14))
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    density.plot(middles, counts / len(at) / width, label=name)
    at_0 = np.interp(0, at, value)
    weights.plot(at[::200], value[::200] / at_0, label=name)
  density.set_title("density of training draws", fontsize=10)
  weights.set_title("weight of the squared error of clean data", fontsize=10)
  weights.set_yscale("log")
  weights.set_ylim(1e-5, 1e5)
  for axes in (density, weights):
    axes.set_xlim(-14, 14)
    axes.set_xlabel("log-SNR = 2 ln(signal / noise)")
    axes.grid(alpha=0.3)
  density.legend(fontsize=7)
  figure.savefig(path, format="png", dpi=120)


def main(argv: list[str]) -> None:
  del argv
  found = measured()
  print("| objective | log-SNR at 5 % | median | 95 % |\n|---|---|---|---|")
  for name, (at, _) in found.items():
    low, median, high = np.quantile(at, [0.05, 0.5, 0.95])
    print(f"| {name} | {low:.1f} | {median:.1f} | {high:.1f} |")
  plot(found, report.ROOT / "docs" / "objectives.png")


if __name__ == "__main__":
  app.run(main)
