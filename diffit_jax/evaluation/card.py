"""A card for every number: what was measured, and all that decides it.

A card is a JSON file:

  metrics       {name: value}, as in `scores`
  not_computed  {name: why}
  num_samples   images that were scored
  protocol      feature space (name, SHA-256 of weights, rule of resizing),
                reference (hash, images), repeats, how a repeat was chosen,
                how classes were told to be the same, if they were compared
  samples       where the images come from; "sampling" holds the sampler,
                steps, seed, guidance, average, precision, VAE, rule of 8 bits,
                and the hashes of weights and config; "subset" says which
                images were taken, where not all were
  per_class     {class: distance}, if asked for
  repeats       [metrics of each run], if there were several
  warnings      what a reader must know before quoting a number
  software      versions
"""

from collections.abc import Mapping
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
from typing import Any

from diffit_jax.errors import UserError

TITLES = {
  "fid": "FID",
  "sfid": "sFID",
  "inception_score": "inception score",
  "precision": "precision",
  "recall": "recall",
  "kid": "KID",
  "intra_fid": "intra-FID",
  "frechet": "Fréchet distance",
  "kernel": "kernel distance",
  "intra_frechet": "mean of the classes' Fréchet distances",
}
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
  """A card of these.

  Args:
    metrics: {name: value}.
    not_computed: {name: why}.
    num_samples: that were scored.
    protocol: see the module.
    samples: where they come from.
    per_class: {class: Fréchet distance}, where it was asked for.
    repeats: the metrics of each run, where there were several.
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
  """A part of a card, as JSON reads it, less what only says where from."""
  part = json.loads(json.dumps(part))
  if isinstance(part, dict):
    part.pop("source", None)
    part.get("sampling", {}).pop("about", None)
  return part


def title(name: str, num_samples: int) -> str:
  """The name to print: FID-50K for 50,000 samples and for no other number."""
  if name == "fid" and num_samples == 50_000:
    return "FID-50K"
  if name in TITLES:
    return TITLES[name]
  if name.endswith("_standard_error"):
    return f"{title(name.removesuffix('_standard_error'), num_samples)}, s.e."
  plain, _, space = name.rpartition("_")
  return f"{TITLES.get(plain, plain)} ({space})"


def lines(card: Mapping[str, Any]) -> str:
  """What an entry point prints of a card."""
  num = card["num_samples"]
  rows = [
    f"{title(name, num)}: {value:.6g}"
    for name, value in card["metrics"].items()
  ]
  rows.append(f"of {num:,} samples")
  if "repeats" in card:
    rows.append(f"reported: {card['protocol']['reported']}")
  rows += [
    f"not computed: {title(name, num)}: {why}"
    for name, why in card["not_computed"].items()
  ]
  return "\n".join(rows + [f"warning: {text}" for text in card["warnings"]])


def write(path: str | os.PathLike, card: Mapping[str, Any]) -> None:
  """Writes a card, whole or not at all."""
  path = pathlib.Path(path)
  partial = path.with_name(f"{path.name}.partial")
  try:
    partial.write_text(json.dumps(card, indent=2) + "\n")
    os.replace(partial, path)
  except OSError as error:
    raise UserError(f"cannot write the card {path}: {error}") from error


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
