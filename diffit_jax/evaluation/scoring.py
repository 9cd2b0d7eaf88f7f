"""Samples and a measure in, a card out.

Every process of a run does all of it; the first one writes.
"""

from collections.abc import Collection, Mapping
import pathlib
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation.collector import remove_partial
from diffit_jax.evaluation.measure import Measure
from diffit_jax.evaluation.metrics import table
from diffit_jax.evaluation.metrics.logit_score import SPLIT_SIZE
from diffit_jax.evaluation.sets import class_matching
from diffit_jax.evaluation.sets.samples import Samples
from diffit_jax.parallel import runtime


class _Score(NamedTuple):
  """What one repeat gives.

  Attributes:
    values: {metric: value}.
    missing: {metric: why it could not be computed}.
    distances: {class: Fréchet distance}, if classes are compared.
    rule: how classes were matched, if they were: "by name" or "by number".
  """

  values: dict[str, float]
  missing: dict[str, str]
  distances: dict[str, float] = {}
  rule: str | None = None


def evaluate(
  measure: Measure,
  samples: Samples,
  *,
  num: int,
  repeats: int = 1,
  partial: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores samples.

  Args:
    measure: what is measured, and against what.
    samples: images, or a network that makes them.
    num: number of samples in a repeat; each repeat takes others.
    repeats: number of repeats; the one with the smallest distance is reported.
    partial: stem of the files that keep what was gathered; None keeps
      nothing.

  Returns:
    The card.

  Raises:
    UserError: too few samples, or ones that cannot be scored.
    Stopped: SIGTERM came first.
  """
  check_num(samples, num, repeats)
  found = [
    _score(measure, samples, num, repeat, partial) for repeat in range(repeats)
  ]
  best, reported = _best([score.values for score in found], measure)
  protocol = measure.protocol() | {"repeats": repeats, "reported": reported}
  protocol["warnings"] += warn_of_order(measure.wanted, samples, num)
  if found[best].rule:
    protocol["classes"] = found[best].rule
  return card_lib.make(
    metrics=found[best].values,
    not_computed=found[best].missing,
    per_class=found[best].distances,
    num_samples=num,
    protocol=protocol,
    samples=_card_entry(samples, num),
    repeats=[score.values for score in found] if repeats > 1 else None,
  )


def _best(found: list[dict[str, float]], measure: Measure) -> tuple[int, str]:
  """Which repeat is reported, and the words that say so."""
  if len(found) == 1:
    return 0, "the only run"
  by = next((name for name in measure.wanted if name in found[0]), None)
  if by is None:
    return 0, "the first run"
  higher = table.find(by).better == "higher"
  values = [-each[by] if higher else each[by] for each in found]
  best = int(np.argmin(values))
  return best, (
    f"run {best + 1} of {len(found)}, the one with the"
    f" {'largest' if higher else 'smallest'} {by} (EDM's rule), not their mean"
  )


def check_num(samples: Samples, num: int, repeats: int) -> None:
  """Raises a UserError where there are not that many samples."""
  available = samples.available
  if num < 2:
    raise UserError(f"--num={num}: a distance needs at least 2 samples")
  if available is not None and available < num * repeats:
    times = f" {repeats} times" if repeats > 1 else ""
    raise UserError(
      f"--num={num}{times} is more than the {available} images of"
      f" {samples.card_entry['source']}"
    )


def _card_entry(samples: Samples, num: int) -> dict[str, Any]:
  """What a card says about the samples, with which of them were taken."""
  rule = samples.subset_rule(num)
  return samples.card_entry | ({"subset": rule} if rule else {})


def warn_of_order(
  wanted: Collection[str], samples: Samples, num: int
) -> list[str]:
  """Warnings where splits of the inception score hold few classes each."""
  is_split = "inception_score" in wanted and num > SPLIT_SIZE
  # Data sets are in mixed order, and a network's classes are dealt out.
  if not is_split or samples.card_entry["kind"] in ("dataset", "network"):
    return []
  classes = samples.classes(0, num)
  changes = [] if classes is None else np.diff(classes.labels)
  if not np.any(changes) or np.any(np.less(changes, 0)):
    return []
  return [
    f"the images lie class by class, and each {SPLIT_SIZE} in that order are a"
    " split of the inception score, which comes out too small with few classes"
    " in each: mix the images"
  ]


def _score(
  measure: Measure,
  samples: Samples,
  num: int,
  repeat: int,
  partial: pathlib.Path | None,
) -> _Score:
  collector, match = measure.collector, None
  source, needs_rows = samples.card_entry["source"], measure.needs_rows
  if measure.per_class:
    classes = samples.classes(repeat, num)
    if classes is None:
      raise UserError(
        f"--per_class needs labels, and the samples of {source} have none: an"
        " npz has them as arr_1"
      )
    match = class_matching.match(classes, measure.reference.images.classes)
  gathered = collector.collect(
    samples.batches(repeat, num, collector.mesh),
    source,
    held=None if needs_rows else np.arange(0),
    stem=partial,
    what=f"samples{repeat}",
    settings={
      "samples": _card_entry(samples, num),
      "range": [repeat * num, num],
      "rows": needs_rows,
    },
  )
  values, missing = table.score(gathered, measure.statistics, measure.wanted)
  if match is None:
    return _Score(values, missing)
  from diffit_jax.evaluation.metrics import frechet

  distances = frechet.per_class(
    gathered.rows(), classes.labels, measure.statistics, match.pairs
  )
  mean = float(np.mean(list(distances.values())))
  values[table.PER_CLASS.name_in(measure.space)] = mean
  return _Score(values, missing, distances, match.rule)


def evaluate_to_file(
  measure: Measure,
  samples: Samples,
  path: pathlib.Path,
  *,
  num: int,
  repeats: int = 1,
) -> dict[str, Any]:
  """The card at `path`: read if it is the same measurement, else made.

  Args: as `evaluate`; and `path`, the card's.
  """

  def find() -> dict[str, Any] | None:
    if not path.exists():
      return None
    card = card_lib.read(path)  # anything else is not written over
    return card if _is_same(card, measure, samples, num, repeats) else None

  card = runtime.on_process_0(find)
  if card is not None:
    logging.info("%s is there already", path)
    return card
  card = evaluate(measure, samples, num=num, repeats=repeats, partial=path)
  if runtime.is_process_0():
    measure.collector.check_claim()
    card_lib.write(path, card)
  remove_partial(path)
  return card


def _is_same(
  card: Mapping[str, Any],
  measure: Measure,
  samples: Samples,
  num: int,
  repeats: int,
) -> bool:
  """Whether a card holds all that is asked for, measured in the same way."""
  found = {**card["protocol"], "samples": card["samples"]}
  wanted = measure.protocol() | {
    "repeats": repeats,
    "samples": _card_entry(samples, num),
  }
  return (
    card_lib.has(card, num, measure.wanted)
    # Cards of before classes had names do not say which are the same.
    and ("classes" in found or not measure.per_class)
    and all(
      card_lib.deciding(found.get(key)) == card_lib.deciding(wanted[key])
      for key in ("features", "reference", "repeats", "samples")
    )
  )
