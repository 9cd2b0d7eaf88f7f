"""What a run's folder tells while it trains: scores, curves, sample grids.

Only files that the trainer and the scorer write, by their names, directly in
their folders; a link that leads out of the folder is passed over. A file that
is damaged or half written never hides the others.
"""

from collections.abc import Iterator, Mapping
import functools
import html
import io
import os
import pathlib
import re
import sys
import types
from typing import NamedTuple

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation import card
from diffit_jax.evaluation.metrics import table

MAX_GRIDS = 24
_MAX_POINTS = 1000  # of a curve; a picture has no room for more
_GRID = re.compile(r"samples_([A-Za-z0-9_.=-]+)_(\d{8,})\.png")
_CARDS = (
  ("evaluation", re.compile(r"[^/\\]+\.json")),
  ("demo", re.compile(r"card\.json")),
)
_EVENTS = re.compile(r"events\.out\.tfevents\.[^/\\]+")
# Folders, and names of their files.
_SHOWN = (*_CARDS, ("tensorboard", _EVENTS), ("samples", _GRID))
_NO_TENSORFLOW = "tensorboard.compat.notf"


class Grid(NamedTuple):
  """A page of samples that the trainer wrote."""

  step: int
  average: str
  image: np.ndarray  # uint8 [h, w] or [h, w, 3]


def inside(
  workdir: pathlib.Path, folder: str, names: re.Pattern
) -> list[pathlib.Path]:
  """Files directly in workdir/folder, by whole names; sorted.

  Links count where they lead to a file in the workdir.
  """
  root = workdir.resolve()
  try:
    found = sorted((root / folder).iterdir())
  except OSError:  # nothing was written there yet
    return []
  return [
    path
    for path in found
    if names.fullmatch(path.name)
    and path.is_file()
    and path.resolve().is_relative_to(root)
  ]


def look(workdir: pathlib.Path) -> dict[str, tuple[int, int]]:
  """{file: (time of its last change, bytes)} of all that is shown of a run."""
  return {
    str(path): (found.st_mtime_ns, found.st_size)
    for folder, names in _SHOWN
    for path in inside(workdir, folder, names)
    if (found := _stat(path)) is not None
  }


def read_cards(workdir: pathlib.Path) -> dict[str, dict | str]:
  """{name: card, or what is wrong with it} of a run, in order of name."""
  found = {}
  for folder, names in _CARDS:
    for path in inside(workdir, folder, names):
      name = f"{folder}/{path.name}"
      try:
        found[name] = card.read(path)
      except UserError as error:
        found[name] = str(error)
  return found


def cards_html(cards: Mapping[str, dict | str]) -> str:
  """A table with a row per card and a column per metric."""
  whole = {k: each for k, each in cards.items() if not isinstance(each, str)}
  if not cards:
    return "<p>No scores yet: no card in evaluation/ or demo/.</p>"
  names = card.metric_names(whole.values())
  nums = {each["num_samples"] for each in whole.values()}
  num = nums.pop() if len(nums) == 1 else 0
  heads = ["card", *(table.title(name, num) for name in names), "samples"]
  rows = [_row("th", heads, 'scope="col"')]
  for name, each in whole.items():
    values = [_value(each["metrics"], metric) for metric in names]
    rows.append(_row("td", [name, *values, f"{each['num_samples']:,}"]))
  notes = [
    f"{name}: {text}"
    for name, each in cards.items()
    for text in (
      [each] if isinstance(each, str) else map(str, each.get("warnings", ()))
    )
  ]
  listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
  return (
    '<div class="wide" tabindex="0" role="region" aria-label="Scores">'
    f"<table><caption>Scores of this run</caption>{''.join(rows)}</table></div>"
    + (f"<ul>{listed}</ul>" if notes else "")
  )


def read_curves(workdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """{name: [(step, value), ..]} of all scalars, the loss first.

  Where a run went on from an earlier step, the later file counts.
  """
  found = {}
  for path in inside(workdir, "tensorboard", _EVENTS):
    for name, step, value in _scalars(path):
      found.setdefault(name, {})[step] = value
  names = sorted(found, key=lambda name: (name != "loss", name))
  return {name: sorted(found[name].items()) for name in names}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
  """At most _MAX_POINTS of them, evenly, the last one among them."""
  stride = -(-len(points) // _MAX_POINTS)
  return points[::-1][::stride][::-1]


def curve_picture(name: str, points: list[tuple[int, float]]) -> np.ndarray:
  """A curve as uint8 [h, w, 3]; values that are not finite are gaps."""
  return _drawn(name, tuple(thinned(points)))


@functools.lru_cache(maxsize=64)  # a plot takes 60 ms, of which all pages wait
def _drawn(name: str, points: tuple[tuple[int, float], ...]) -> np.ndarray:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  steps, values = np.array(points, np.float64).T
  figure = Figure((4.8, 3.0), dpi=100, layout="constrained")
  axes = figure.subplots()
  marker = "o" if len(steps) < 30 else None
  axes.plot(steps, values, marker=marker, markersize=3)
  axes.set_title(name)
  axes.set_xlabel("step")
  axes.grid(alpha=0.3)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def curve_text(name: str, points: list[tuple[int, float]]) -> str:
  """What a curve shows, in words."""
  (first, start), (last, end) = points[0], points[-1]
  if first == last:
    return f"{name}: {end:.4g} at step {last}"
  return f"{name}: {start:.4g} at step {first}, {end:.4g} at step {last}"


def read_grids(workdir: pathlib.Path) -> list[Grid]:
  """Grids of samples, at most MAX_GRIDS evenly over time, the newest last."""
  paths = inside(workdir, "samples", _GRID)
  paths.sort(key=lambda path: int(_GRID.fullmatch(path.name)[2]))
  if len(paths) > MAX_GRIDS:
    places = np.linspace(0, len(paths) - 1, MAX_GRIDS).round().astype(int)
    paths = [paths[i] for i in places]
  return [grid for path in paths if (grid := _grid(path)) is not None]


def _stat(path: pathlib.Path) -> os.stat_result | None:
  """None where the file has just gone."""
  try:
    return path.stat()
  except OSError:
    return None


def _grid(path: pathlib.Path) -> Grid | None:
  """None where the file is damaged."""
  from PIL import Image

  average, step = _GRID.fullmatch(path.name).groups()
  try:
    with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as file:
      return Grid(int(step), average, np.asarray(file.convert("RGB")))
  # Pillow has no one class for damage.
  except Exception:
    return None


def _scalars(path: pathlib.Path) -> Iterator[tuple[str, int, float]]:
  """(name, step, value) of an event file, up to where it was cut."""
  # Where this module is there, TensorBoard loads no TensorFlow.
  sys.modules.setdefault(_NO_TENSORFLOW, types.ModuleType(_NO_TENSORFLOW))
  from tensorboard.backend.event_processing import event_file_loader
  from tensorboard.plugins.scalar import metadata
  from tensorboard.util import tensor_util

  plugins = {}  # only a name's first value tells of which kind it is
  for event in event_file_loader.EventFileLoader(os.fspath(path)).Load():
    for value in event.summary.value:
      plugin = value.metadata.plugin_data.plugin_name
      if plugins.setdefault(value.tag, plugin) == metadata.PLUGIN_NAME:
        number = tensor_util.make_ndarray(value.tensor)
        yield value.tag, event.step, float(number)


def _value(metrics: Mapping[str, float], name: str) -> str:
  value = metrics.get(name)
  if value is None:
    return "-"
  error = metrics.get(name + table.STANDARD_ERROR)
  return f"{value:.5g}" + (f" ± {error:.1g}" if error is not None else "")


def _row(tag: str, cells: list[str], attributes: str = "") -> str:
  opening = f"<{tag} {attributes}>" if attributes else f"<{tag}>"
  return "".join(
    ["<tr>", *(f"{opening}{html.escape(x)}</{tag}>" for x in cells), "</tr>"]
  )
