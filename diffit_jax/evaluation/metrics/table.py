"""The table of metrics: a new metric is one file beside this and one row here.

Names on cards, titles, `--metrics` and its errors, which metrics need features
of single images, and which checkpoint is the best are all read from the table.
In the space of Inception a metric has the field's name; elsewhere its name ends
in that of the space, since a Fréchet distance is called FID in that space
alone. This module is light: a metric's file is imported when it is computed.
"""

from collections.abc import Collection, Mapping
import dataclasses
import importlib
from typing import Any

from diffit_jax.errors import UserError

STANDARD_ERROR = "_standard_error"  # ends the name of a number's own error
_INCEPTION = "inception"


@dataclasses.dataclass(frozen=True)
class Metric:
  """A row.

  Attributes:
    name: key on a card, in the space of Inception.
    title: words that are printed there.
    compute: "file.function" of this package, the function being (samples'
      FeatureStatistics, ReferenceStatistics) -> {name: value}; it may give
      several rows at once, and standard errors beside them.
    needs: what is compared: "pool" or "spatial", moments of these features;
      "rows", features of single images; "logits" of the samples alone.
    better: "lower" or "higher".
    elsewhere: (start of the key, title) in other spaces; None where the metric
      needs Inception.
  """

  name: str
  title: str
  compute: str
  needs: str
  better: str
  elsewhere: tuple[str, str] | None = None

  def name_in(self, space: str) -> str:
    """Key on a card, in that feature space."""
    return self.name if space == _INCEPTION else f"{self.elsewhere[0]}_{space}"


METRICS = (
  Metric("fid", "FID", "frechet.fid", "pool", "lower",
         ("frechet", "Fréchet distance")),
  Metric("sfid", "sFID", "frechet.sfid", "spatial", "lower"),
  Metric("inception_score", "inception score", "logit_score.score_samples",
         "logits", "higher"),
  Metric("precision", "precision", "neighbours.precision_and_recall", "rows",
         "higher", ("precision", "precision")),
  Metric("recall", "recall", "neighbours.precision_and_recall", "rows",
         "higher", ("recall", "recall")),
  Metric("kid", "KID", "kernel.kid", "rows", "lower",
         ("kernel", "kernel distance")),
)  # fmt: skip
# Made by --per_class, of the distances that `frechet.per_class` gives.
PER_CLASS = Metric(
  "intra_fid", "intra-FID", "", "rows", "lower",
  ("intra_frechet", "mean of the classes' Fréchet distances"),
)  # fmt: skip


def names(space: str) -> tuple[str, ...]:
  """Keys on a card of all that can be computed in a feature space."""
  is_inception = space == _INCEPTION
  return tuple(
    row.name_in(space) for row in METRICS if is_inception or row.elsewhere
  )


def choose(wanted: Collection[str], space: str) -> tuple[str, ...]:
  """The wanted metrics of a space, in the table's order; all if none is wanted.

  Raises:
    UserError: a name that the space does not have.
  """
  known = names(space)
  unknown = [name for name in wanted if name not in known]
  if unknown:
    raise UserError(
      f"--metrics={','.join(wanted)}: {unknown[0]!r} is not among"
      f" {', '.join(known)}"
    )
  return tuple(name for name in known if not wanted or name in wanted)


def find(name: str) -> Metric | None:
  """The row of a key on a card, whatever its space; None for an unknown one."""
  start, _, space = name.rpartition("_")
  for row in (*METRICS, PER_CLASS):
    if name == row.name or (space and start in (row.elsewhere or ())[:1]):
      return row
  return None


def title(name: str, num_samples: int) -> str:
  """The name to print: FID-50K for 50,000 samples and for no other number."""
  if name.endswith(STANDARD_ERROR):
    return f"{title(name.removesuffix(STANDARD_ERROR), num_samples)}, s.e."
  row = find(name)
  if row is None:
    return name  # on a card of another version
  if name != row.name:
    return f"{row.elsewhere[1]} ({name.rpartition('_')[2]})"
  return "FID-50K" if name == "fid" and num_samples == 50_000 else row.title


def need_rows(wanted: Collection[str]) -> bool:
  """Whether any of the metrics compares single images."""
  return any(find(name).needs == "rows" for name in wanted)


def is_distance(name: str) -> bool:
  """Whether `--metrics` can be this name, and lower values of it are better."""
  row = find(name)
  return row in METRICS and row.better == "lower"


def score(
  samples: Any, reference: Any, wanted: Collection[str]
) -> tuple[dict[str, float], dict[str, str]]:
  """The wanted metrics, and why some could not be computed.

  Args:
    samples: FeatureStatistics, with all rows where `need_rows`.
    reference: ReferenceStatistics that the samples are compared with.
    wanted: names as from `choose`.

  Returns:
    {name: value}, {name: reason}; a name is in one of the two.
  """
  values, missing, computed = {}, {}, {}
  for name in wanted:
    row = find(name)
    if row.needs in reference.missing:
      missing[name] = reference.missing[row.needs]
      continue
    try:
      if row.compute not in computed:
        computed[row.compute] = _compute(row, samples, reference)
    except UserError as error:
      missing[name] = str(error)
      continue
    found: Mapping[str, float] = computed[row.compute]
    values[name] = found[row.name]
    if (error := row.name + STANDARD_ERROR) in found:
      values[name + STANDARD_ERROR] = found[error]
  return values, missing


def _compute(row: Metric, samples, reference) -> Mapping[str, float]:
  file, function = row.compute.split(".")
  module = importlib.import_module(f"{__package__}.{file}")
  return getattr(module, function)(samples, reference)
