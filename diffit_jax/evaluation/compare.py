"""Several cards as one table, with what was measured differently."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation.metrics import table as metric_table

# What only tells where a number comes from.
_PASSED_OVER = {
  "protocol.warnings",
  "protocol.reported",
  "protocol.reference.source",
  "samples.source",
  "samples.num",
  "samples.kind",
  "samples.split",
  "samples.content_hash",
  "samples.sampling.about.source",
  "samples.sampling.about.source_sha256",
  "samples.sampling.about.vae_source",
}
_PARTS = {  # of a card, and the line above their differences
  "protocol": "Measured differently, so the numbers do not compare as they"
  " stand:",
  "samples": "Made differently:",
  "software": "Other software:",
}
_LEFT = 24  # characters of a value that are shown


def table(cards: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown: a row per card, a column per metric, then the differences.

  Args:
    cards: {name: card}, in the order of the rows.
  """
  names = card_lib.metric_names(cards.values())
  same_num = len({card["num_samples"] for card in cards.values()}) == 1
  num = next(iter(cards.values()))["num_samples"] if same_num else 0
  rows = [["", *(metric_table.title(name, num) for name in names), "samples"]]
  for label, card in cards.items():
    values = [_value(card, name) for name in names]
    rows.append([label, *values, f"{card['num_samples']:,}"])
  return "\n".join(_markdown(rows) + ["", *_differences(cards)])


def _value(card: Mapping[str, Any], name: str) -> str:
  value = card["metrics"].get(name)
  if value is None:
    return "-"
  error = card["metrics"].get(name + metric_table.STANDARD_ERROR)
  return f"{value:.5g}" + (f" ± {error:.1g}" if error is not None else "")


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
  line = lambda cells: f"| {' | '.join(cells)} |"
  return [line(rows[0]), line(["---"] * len(rows[0])), *map(line, rows[1:])]


def _differences(cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Lines on what differs: how it was measured, then what was measured."""
  flat = {
    label: _flatten({key: card.get(key) for key in ("num_samples", *_PARTS)})
    for label, card in cards.items()
  }
  keys = dict.fromkeys(key for fields in flat.values() for key in fields)
  lines = {part: [] for part in _PARTS}
  for key in keys:
    values = {label: fields.get(key) for label, fields in flat.items()}
    if key in _PASSED_OVER or len(set(map(_text, values.values()))) == 1:
      continue
    shown = ", ".join(f"{label} {_text(v)}" for label, v in values.items())
    part = key.partition(".")[0]
    lines[part if part in lines else "protocol"].append(f"- {key}: {shown}")
  found = []
  for part, text in _PARTS.items():
    if lines[part]:
      found += [text, *lines[part], ""]
  if not lines["protocol"]:
    found.insert(0, "Measured alike: samples, reference, features and rule.\n")
  return found[:-1] if found and not found[-1] else found


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  found = {}
  for key, value in tree.items():
    found |= _flatten(value, f"{prefix}.{key}" if prefix else key)
  return found


def _text(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= _LEFT else f"{text[:_LEFT]}..."
