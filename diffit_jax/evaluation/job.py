"""Samples and a measure in, a card out.

Every process of a run does all of it; the first one writes.
"""

from collections.abc import Collection, Mapping
import pathlib
from typing import Any

from absl import logging
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation.measure import Measure, partial_file, remove_partial
from diffit_jax.evaluation.metrics import scores
from diffit_jax.evaluation.metrics.logit_score import SPLIT_SIZE
from diffit_jax.evaluation.sets import class_matching as classes_lib
from diffit_jax.evaluation.sets.samples import Samples
from diffit_jax.parallel import runtime


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
    samples: the samples.
    num: how many; each repeat takes others.
    repeats: of which the one with the smallest distance is reported.
    partial: stem of the files that keep what was gathered; None for none.

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
  best, reported = _best([values for values, *_ in found], measure)
  values, missing, classes, rule = found[best]
  protocol = measure.protocol() | {"repeats": repeats, "reported": reported}
  protocol["warnings"] += warn_of_order(measure.wanted, samples, num)
  if rule:
    protocol["classes"] = rule
  return card_lib.make(
    metrics=values,
    not_computed=missing,
    per_class=classes,
    num_samples=num,
    protocol=protocol,
    samples=_about(samples, num),
    repeats=[each for each, *_ in found] if repeats > 1 else None,
  )


def _best(found: list[dict[str, float]], measure: Measure) -> tuple[int, str]:
  """Which repeat is reported, and the words that say so."""
  if len(found) == 1:
    return 0, "the only run"
  by = next((name for name in measure.wanted if name in found[0]), None)
  if by is None:
    return 0, "the first run"
  more = scores.plain(by, measure.space) in scores.MORE_IS_BETTER
  values = [-each[by] if more else each[by] for each in found]
  best = int(np.argmin(values))
  return best, (
    f"run {best + 1} of {len(found)}, the one with the"
    f" {'largest' if more else 'smallest'} {by} (EDM's rule), not their mean"
  )


def check_num(samples: Samples, num: int, repeats: int) -> None:
  available = samples.available
  if num < 2:
    raise UserError(f"--num={num}: a distance needs at least 2 samples")
  if available is not None and available < num * repeats:
    times = f" {repeats} times" if repeats > 1 else ""
    raise UserError(
      f"--num={num}{times} is more than the {available} images of"
      f" {samples.about['source']}"
    )


def _about(samples: Samples, num: int) -> dict[str, Any]:
  """What a card says of the samples, with which of them were taken."""
  rule = samples.subset_rule(num)
  return samples.about | ({"subset": rule} if rule else {})


def warn_of_order(
  wanted: Collection[str], samples: Samples, num: int
) -> list[str]:
  """What to say where splits of the inception score hold few classes each."""
  is_split = "inception_score" in wanted and num > SPLIT_SIZE
  # Data sets are in mixed order, and a network's classes are dealt out.
  if not is_split or samples.about["kind"] in ("dataset", "network"):
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


def _classes(samples: Samples, num: int, repeat: int) -> classes_lib.Classes:
  classes = samples.classes(repeat, num)
  if classes is None:
    raise UserError(
      f"--per_class needs labels, and the samples of {samples.about['source']}"
      " have none: an npz has them as arr_1"
    )
  return classes


def _score(measure, samples, num, repeat, partial):
  """(metrics, why others are missing, distances by class, how classes were
  told to be the same) of one repeat.
  """
  collector, match = measure.collector, None
  if measure.per_class:
    classes = _classes(samples, num, repeat)
    match = classes_lib.match(classes, measure.reference.images.classes)
  needs_rows = measure.per_class or scores.need_rows(
    measure.wanted, measure.space
  )
  settings = {
    "samples": _about(samples, num),
    "extractor": dict(collector.extractor.about),
    "range": [repeat * num, num],
    "rows": needs_rows,
  }
  file = partial_file(partial, f"samples{repeat}", settings, collector)
  gathered = collector.collect(
    samples.batches(repeat, num, collector.mesh),
    f"features of {samples.about['source']}",
    held=None if needs_rows else np.arange(0),
    partial=file,
  )
  values, missing = scores.score(
    gathered, measure.statistics, measure.wanted, measure.space
  )
  if match is None:
    return values, missing, {}, None
  distances = scores.per_class(
    gathered.rows(), classes.labels, measure.statistics, match.pairs
  )
  name = "fid" if measure.space == "inception" else f"frechet_{measure.space}"
  values[f"intra_{name}"] = float(np.mean(list(distances.values())))
  return values, missing, distances, match.rule


def refuse_folder(out: pathlib.Path) -> None:
  """Refuses an --out that is to be a card and is a folder."""
  if out.is_dir():
    raise UserError(f"--out={out} is a folder: a card is a file, as card.json")


def prepare_output(out: pathlib.Path, is_folder: bool) -> None:
  """Makes the folder that cards go into, and refuses where that fails."""
  folder = out if is_folder else out.parent
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the folder {folder}: {error}") from error


def evaluate_to_file(
  measure: Measure, samples: Samples, path: pathlib.Path, **options
) -> dict[str, Any]:
  """The card at `path`: read where it is the same measurement, else made.

  Args:
    measure: what is measured.
    samples: the samples.
    path: of the card.
    **options: num and repeats of `evaluate`.
  """

  def find() -> dict[str, Any] | None:
    if not path.exists():
      return None
    card = card_lib.read(path)  # anything else is not written over
    return card if _is_same(card, measure, samples, **options) else None

  card = runtime.from_first(find)
  if card is not None:
    logging.info("%s is there already", path)
    return card
  card = evaluate(measure, samples, partial=path, **options)
  if runtime.is_first():
    measure.collector.check_claim()
    card_lib.write(path, card)
  remove_partial(path)
  return card


def _is_same(
  card: Mapping[str, Any], measure: Measure, samples: Samples, num, repeats
) -> bool:
  """Whether a card holds all that is asked for, measured in the same way."""
  found = {**card["protocol"], "samples": card["samples"]}
  wanted = {
    **measure.protocol(),
    "repeats": repeats,
    "samples": _about(samples, num),
  }
  done = {*card["metrics"], *card["not_computed"]}
  return (
    card["num_samples"] == num
    and {*measure.wanted} <= done
    # Cards of before classes had names do not say which are the same.
    and ("classes" in found or not measure.per_class)
    and all(
      card_lib.deciding(found.get(key)) == card_lib.deciding(wanted[key])
      for key in ("features", "reference", "repeats", "samples")
    )
  )
