"""The same measurement for several values of one sampler field, and a plot."""

from collections.abc import Mapping
import pathlib
from typing import Any

from diffit_jax import ranges, whole
from diffit_jax.errors import UserError
from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation import compare
from diffit_jax.evaluation.metrics import table

# Fields of config.sampler that are numbers, with the label of the axis.
FIELDS = {
  "guidance_scale": "guidance scale",
  "guidance_power": "power of the guidance schedule",
  "guide_scale": "weight of autoguidance",
  "steps": "solver steps",
}


def parse(text: str | None) -> tuple[str | None, list]:
  """("steps", [10, 20]) from "steps=10,20"; (None, [None]) from None.

  Raises:
    UserError: a field that cannot be swept, or values that are no numbers.
  """
  if text is None:
    return None, [None]
  name, _, values = text.partition("=")
  if name not in FIELDS:
    raise UserError(
      f"--sweep={text}: write FIELD=VALUE,VALUE with a field of"
      f" {', '.join(FIELDS)}"
    )
  try:
    kind = int if name == "steps" else float
    numbers = [kind(value) for value in values.split(",")]
  except ValueError as error:
    raise UserError(
      f"--sweep={text}: {values!r} are no numbers, separated by commas"
    ) from error
  for number in numbers:
    ranges.check({name: number}, "sampler", "--sweep: ")
  if len(set(numbers)) != len(numbers):
    raise UserError(f"--sweep={text}: a value stands there twice")
  return name, numbers


def card_path(
  out: pathlib.Path, name: str | None, value: float | None
) -> pathlib.Path:
  """Path of a card: in the folder `out` in a sweep, else `out` itself."""
  return out / f"{name}={value:g}.json" if name else out


def write(
  name: str, cards: Mapping[float, Mapping[str, Any]], out: pathlib.Path
) -> pathlib.Path:
  """Writes table.md and plot.png of the cards; returns the plot's path."""
  text = compare.table({f"{value:g}": card for value, card in cards.items()})
  try:
    (out / "table.md").write_text(text + "\n")
    plot(name, cards, out / "plot.png")
  except OSError as error:
    raise UserError(f"cannot write to --out={out}: {error}") from error
  return out / "plot.png"


def plot(
  name: str, cards: Mapping[float, Mapping[str, Any]], path: pathlib.Path
) -> None:
  """Draws every metric over the field, one panel each.

  Args:
    name: the field.
    cards: {value of the field: card}.
    path: the PNG file.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  values = sorted(cards)
  num = cards[values[0]]["num_samples"]
  metrics = card_lib.metric_names(cards[x] for x in values)
  figure = Figure(figsize=(3.6 * len(metrics), 3.2), layout="constrained")
  FigureCanvasAgg(figure)
  for i, metric in enumerate(metrics):
    axes = figure.add_subplot(1, len(metrics), i + 1)
    found = [cards[x]["metrics"].get(metric, float("nan")) for x in values]
    axes.plot(values, found, marker="o")
    axes.set_xlabel(FIELDS[name])
    axes.set_title(table.title(metric, num), fontsize=9)
    axes.grid(alpha=0.3)
    if name == "steps" and values[-1] >= 8 * values[0]:
      axes.set_xscale("log")
  figure.suptitle(f"{num:,} samples per point", fontsize=10)
  with whole.writing(path) as partial:
    figure.savefig(partial, format="png", dpi=120)
