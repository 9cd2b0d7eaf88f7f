"""A card for every number: what was measured, and all that decides it.

A card is a JSON file:

  metrics       {name: value}, see `metrics.table`
  not_computed  {name: why}
  num_samples   number of images that were scored
  protocol      feature space (name, SHA-256 of weights, rule of resizing),
                reference (hash, images), repeats, how a repeat was chosen,
                how classes were matched, if they were compared
  samples       where the images come from; "sampling" holds the sampler,
                steps, seed, guidance, average, precision, VAE, rule of 8 bits,
                and the hashes of weights and config; "subset" says which
                images were taken, if not all were
  per_class     {class: distance}, if asked for
  repeats       [metrics of each run], if there were several
  warnings      what a reader must know before quoting a number
  software      versions
"""

from collections.abc import Iterable, Mapping
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
from typing import Any

from diffit_jax import whole
from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import table

FOLDER = "evaluation"  # in a workdir: cards of a run that scores itself
_PARTS = ("metrics", "not_computed", "protocol", "samples")  # {name: ...} each
_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "scikit-learn", "Pillow")


def make(
  *,
  metrics: Mapping[str, float],
  not_computed: Mapping[str, str],
  num_samples: int,
  protocol: Mapping[str, Any],
  samples: Mapping[str, Any],
  per_class: Mapping[str, float] | None = None,
  repeats: list[dict[str, float]] | None = None,
) -> dict[str, Any]:
  """A card with these parts, its warnings, versions and the date.

  The arguments are described at the top of the module.
  """
  card = {
    "metrics": dict(metrics),
    "not_computed": dict(not_computed),
    "num_samples": num_samples,
    "warnings": _warnings(num_samples, protocol, samples),
    "protocol": dict(protocol),
    "samples": dict(samples),
    "software": software(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  if per_class:
    card["per_class"] = dict(per_class)
  if repeats:
    card["repeats"] = repeats
  return card


def software() -> dict[str, str]:
  """Versions of what the numbers are made with, and the machine."""
  from diffit_jax import __version__

  found = {"diffit_jax": __version__, "python": platform.python_version()}
  found |= {name: metadata.version(name) for name in _PACKAGES}
  return found | {"machine": platform.machine()}


def _warnings(num: int, protocol: Mapping, samples: Mapping) -> list[str]:
  found, dim = [], protocol["features"]["dimensions"]
  if num < dim:
    found.append(
      f"{num} samples are fewer than the {dim} dimensions of the features:"
      " their covariance is singular, and distances come out too large; compare"
      " only with cards of as many samples"
    )
  if not samples.get("sampling"):
    found.append(
      "the samples came without the settings that they were made with (no"
      " sampling.json beside them)"
    )
  return found + list(protocol.get("warnings", ()))


def deciding(part: Any) -> Any:
  """A part of a card as JSON reads it, without what only tells its source."""
  part = json.loads(json.dumps(part))
  if isinstance(part, dict):
    part.pop("source", None)
    part.get("sampling", {}).pop("about", None)
  return part


def has(card: Mapping[str, Any], num: int, wanted: Iterable[str]) -> bool:
  """Whether a card tells these metrics of that many samples."""
  done = {*card["metrics"], *card["not_computed"]}
  return card["num_samples"] == num and {*wanted} <= done


def metric_names(cards: Iterable[Mapping[str, Any]]) -> list[str]:
  """The metrics on any of the cards, in order, without standard errors."""
  names = dict.fromkeys(name for card in cards for name in card["metrics"])
  return [name for name in names if not name.endswith(table.STANDARD_ERROR)]


def lines(card: Mapping[str, Any]) -> str:
  """A card as an entry point prints it."""
  num = card["num_samples"]
  rows = [
    f"{table.title(name, num)}: {value:.6g}"
    for name, value in card["metrics"].items()
  ]
  rows.append(f"of {num:,} samples")
  if "repeats" in card:
    rows.append(f"reported: {card['protocol']['reported']}")
  rows += [
    f"not computed: {table.title(name, num)}: {why}"
    for name, why in card["not_computed"].items()
  ]
  return "\n".join(rows + [f"warning: {text}" for text in card["warnings"]])


def write(path: str | os.PathLike, card: Mapping[str, Any]) -> None:
  """Writes a card: the whole of it or nothing."""
  try:
    with whole.writing(path) as partial:
      partial.write_text(json.dumps(card, indent=2) + "\n")
  except OSError as error:
    raise UserError(f"cannot write the card {path}: {error}") from error


def path_of_step(folder: str | os.PathLike, step: int) -> pathlib.Path:
  """The card of a step of a run that scores itself, in its folder of cards."""
  return pathlib.Path(folder) / f"step_{step:08d}.json"


def read(path: str | os.PathLike) -> dict[str, Any]:
  """A card that `write` wrote."""
  try:
    card = json.loads(pathlib.Path(path).read_text())
    is_whole = all(isinstance(card[part], dict) for part in _PARTS)
    if is_whole and isinstance(card["num_samples"], int):
      return card
  except OSError as error:
    raise UserError(f"cannot read the card {path}: {error}") from error
  except (ValueError, KeyError, TypeError):
    pass
  raise UserError(
    f"{path} is no card that diffit_jax.evaluate wrote, or a damaged one:"
    " delete it, or name another file"
  )
