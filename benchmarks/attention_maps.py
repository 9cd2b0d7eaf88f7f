"""Attention of the centre token along the sampling trajectory (Figure 2).

  python -m benchmarks.attention_maps --models=runs/digits --out=attention.png
  python -m benchmarks.attention_maps --models=runs/with,runs/without

Each model, a workdir or a .safetensors file, makes samples with its config's
sampler, those of `sample`. In the picture, columns are noise levels of the
first sample's trajectory; rows are its noisy image and, for some of the blocks,
the softmax of equation (6) with the centre token (red) as the query, averaged
over heads: what that token reads at that moment. A row's colours go from 0 to
the number beside it. A windowed block sees its window only; the rest is left
gray.

The table says how far attention moves between the first column and the last:
the share of a token's weight that lands on other tokens (total variation),
averaged over tokens, heads and --num samples.
"""

from collections.abc import Sequence
import dataclasses
import pathlib

from absl import flags
import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax import cli, paths
from diffit_jax.generation import generator, stepwise, weights
from diffit_jax.generation.attention_maps import (
  attention_weights,
  centre_map,
  network_order,
)
from diffit_jax.generation.labels import choose_labels
from diffit_jax.models.compute import PLAIN
from diffit_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Maps:
  """What was seen of one model.

  Attributes:
    name: of its config.
    levels: [columns] noise levels, falling.
    states: [columns, h, w, c] the first sample on its way.
    weights: {block: [columns, b, windows, heads, n, n]} in the network's order.
  """

  name: str
  levels: np.ndarray
  states: np.ndarray
  weights: dict[str, np.ndarray]


def main() -> int:
  given = flags.FLAGS
  cli.require_one_of(models=given.models)
  found = [
    follow(load(path), given.num, given.seed, given.labels, given.columns)
    for path in map(paths.expand, given.models)
  ]
  print(table(found))
  draw(found, given.rows, given.out)
  print(f"picture: {given.out}")
  return 0


def load(path: str) -> weights.Weights:
  """The averaged weights of a workdir or a file, on one device."""
  mesh = one_device()
  if path.endswith(".safetensors"):
    return weights.from_file(path, mesh)
  return weights.from_workdir(path, mesh)


def one_device() -> Mesh:
  return make_mesh(devices=jax.devices()[:1])


def follow(
  loaded: weights.Weights,
  num: int,
  seed: int,
  labels: str | None,
  columns: int,
) -> Maps:
  """Samples, and looks at the attention at some noise levels on the way."""
  config, params = loaded.config, loaded.params
  num_classes = config.model.num_classes
  model, mesh = generator.make_model(config), one_device()
  labels = labels or (f"0-{num_classes - 1}" if num_classes else "random")
  index = np.arange(num, dtype=np.uint32)
  labels = choose_labels(index, seed, num_classes, labels)
  plain = model.clone(attention=PLAIN)
  read = jax.jit(
    attention_weights(plain, config, labels if num_classes else None)
  )
  watched = stepwise.Stepwise(model, config, mesh)
  run, seen = watched.begin(params, seed, index, labels), []
  chosen = np.linspace(0, watched.num_evaluations - 1, columns)
  for i in chosen.round().astype(int):
    run = watched.advance(run, int(i))
    x, level, _ = watched.look(run)
    seen.append((level[0], x[0], read(params, x, level)))
  levels, states, maps = zip(*seen)
  return Maps(
    name=config.name,
    levels=np.array(levels),
    states=np.array(states),
    weights={
      name: np.stack([each[name] for each in maps])
      for name in sorted(maps[0], key=network_order)
    },
  )


def moved(weights: np.ndarray) -> float:
  """Total variation between first and last column, mean over all queries."""
  first, last = weights[0].astype(np.float64), weights[-1]
  return float(np.abs(first - last).sum(-1).mean() / 2)


def table(found: Sequence[Maps]) -> str:
  """Markdown: how far the attention of every block moved."""
  lines = ["| model | block | heads | window | attention moved |"]
  lines.append("|---|---|---|---|---|")
  for maps in found:
    for block, each in maps.weights.items():
      *_, heads, n, _ = each.shape
      lines.append(
        f"| {maps.name} | {block} | {heads} | {round(n**0.5)} |"
        f" {moved(each):.3f} |"
      )
  return "\n".join(lines)


def draw(found: Sequence[Maps], num_blocks: int, path: str) -> None:
  """Writes the picture: states and centre maps, a column per noise level."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = len(found[0].levels)
  rows = [
    (maps, block)
    for maps in found
    for block in [None, *_spread(list(maps.weights), num_blocks)]
  ]
  figure = Figure(
    figsize=(1.9 + 1.05 * columns, 0.3 + 1.15 * len(rows)),
    layout="constrained",
  )
  FigureCanvasAgg(figure)
  grid = figure.subplots(len(rows), columns, squeeze=False)
  for line, (maps, block) in zip(grid, rows):
    pictures = list(maps.states)
    if block:
      pictures = [centre_map(each[0]) for each in maps.weights[block]]
    top = np.nanmax(pictures) if block else None
    for axes, level, picture in zip(line, maps.levels, pictures):
      axes.set(xticks=[], yticks=[], facecolor="0.85")
      if block:
        axes.imshow(picture, vmin=0, vmax=top, cmap="viridis")
        centre = len(picture) // 2
        axes.plot(centre, centre, "r+", ms=5)
      else:
        axes.set_title(f"{level:.3g}", fontsize=8)
        axes.imshow(_visible(picture), cmap="gray")
    label = (
      f"{block}\nup to {top:.2f}" if block else f"{maps.name}\nnoise level"
    )
    line[0].set_ylabel(
      label, rotation=0, ha="right", va="center", fontsize=7, labelpad=6
    )
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, format="png", dpi=130)


def _spread(blocks: list[str], num: int) -> list[str]:
  index = np.linspace(0, len(blocks) - 1, min(num, len(blocks)))
  return [blocks[i] for i in index.round().astype(int)]


def _visible(state: np.ndarray) -> np.ndarray:
  """A noisy state in 0..1, gray or with its first three channels."""
  state = state[..., :3] if state.shape[-1] >= 3 else state[..., 0]
  return (state - state.min()) / np.ptp(state)


if __name__ == "__main__":
  flags.DEFINE_list("models", None, "Workdirs or .safetensors files.")
  cli.define_path("out", "The picture.", "attention.png")
  flags.DEFINE_string(
    "labels", None, "Classes, in turn; default all there are."
  )
  flags.DEFINE_integer("seed", 0, "Of the initial noise.", 0)
  flags.DEFINE_integer("num", 20, "Samples that the table is made of.", 1)
  flags.DEFINE_integer("columns", 8, "Noise levels shown.", 2)
  flags.DEFINE_integer("rows", 4, "Blocks shown, evenly spread.", 1)
  cli.run(main)
