"""From the statistics of samples and of a reference to named numbers.

In the space of Inception the names are the field's; elsewhere they bear the
name of the space, since a Fréchet distance is called FID in that space alone.
"""

from collections.abc import Collection
import dataclasses

import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import distances as metrics
from diffit_jax.evaluation.metrics.statistics import Statistics

Gaussian = tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]

# The metrics of the Inception space, and of any other one.
INCEPTION = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
OTHERS = ("frechet", "precision", "recall", "kernel")
_NEEDS_ROWS = {"precision", "recall", "kid", "kernel"}
# Of the names without their space: whether more is better.
MORE_IS_BETTER = {"inception_score", "precision", "recall"}


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
  """What samples are compared with; None for what is not known.

  Attributes:
    pool: mean and covariance of the features.
    spatial: of Inception's spatial features.
    rows: [m, d] features of single images.
    missing: {metric without its space: why it cannot be computed}.
    labels: [m] classes of the rows.
  """

  pool: Gaussian | None
  spatial: Gaussian | None
  rows: np.ndarray | None
  missing: dict[str, str]
  labels: np.ndarray | None = None


def names(space: str) -> tuple[str, ...]:
  """What can be computed in a space, as it is called on a card."""
  if space == "inception":
    return INCEPTION
  return tuple(f"{name}_{space}" for name in OTHERS)


def choose(wanted: Collection[str], space: str) -> tuple[str, ...]:
  """The wanted metrics of a space, checked; all of them for none.

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


def plain(name: str, space: str) -> str:
  """The name without its space."""
  return name if space == "inception" else name.removesuffix(f"_{space}")


def need_rows(wanted: Collection[str], space: str) -> bool:
  """Whether any of the metrics compares single images."""
  return any(plain(name, space) in _NEEDS_ROWS for name in wanted)


def score(
  samples: Statistics,
  reference: ReferenceStatistics,
  wanted: Collection[str],
  space: str,
) -> tuple[dict[str, float], dict[str, str]]:
  """The wanted metrics, and why some could not be computed.

  Args:
    samples: their statistics, with all rows where `need_rows`.
    reference: what they are compared with.
    wanted: as from `choose`.
    space: of the features.

  Returns:
    {name: value}, {name: reason}; a name is in one of the two.
  """
  values, missing = {}, {}
  shared = {}  # precision and recall are made by one call
  for name in wanted:
    kind = plain(name, space)
    if kind in reference.missing:
      missing[name] = reference.missing[kind]
      continue
    try:
      values |= _compute(name, kind, samples, reference, shared)
    except UserError as error:
      missing[name] = str(error)
  return values, missing


def _compute(name, kind, samples, reference, shared) -> dict[str, float]:
  if kind in ("fid", "frechet"):
    return {name: _frechet(samples.pool, reference.pool)}
  if kind == "sfid":
    return {name: _frechet(samples.spatial, reference.spatial)}
  if kind == "inception_score":
    return {name: samples.score.result()}
  if kind in ("precision", "recall"):
    if not shared:
      shared["precision"], shared["recall"] = metrics.precision_recall(
        reference.rows, samples.rows()
      )
    return {name: shared[kind]}
  blocks = metrics.kid_blocks(reference.rows, samples.rows())
  found = {name: float(blocks.mean())}
  if len(blocks) > 1:
    error = blocks.std(ddof=1) / np.sqrt(len(blocks))
    found[f"{name}_standard_error"] = float(error)
  return found


def _frechet(moments, reference: Gaussian) -> float:
  return metrics.frechet_distance(
    moments.mean, moments.covariance(), *reference
  )


def per_class(
  rows: np.ndarray,
  labels: np.ndarray,
  reference: ReferenceStatistics,
  pairs: Collection[tuple[str, int, int]],
) -> dict[str, float]:
  """Fréchet distance of each class's samples from the same class's reference.

  Args:
    rows: [n, d] features of the samples.
    labels: [n] their classes.
    reference: with rows and labels.
    pairs: which classes are the same, see `classes.Match`.

  Returns:
    {title of the class: distance}.

  Raises:
    UserError: a class with fewer than two images on either side.
  """
  found = {}
  for title, our_label, their_label in pairs:
    ours = rows[labels == our_label]
    theirs = reference.rows[reference.labels == their_label]
    if min(len(ours), len(theirs)) < 2:
      raise UserError(
        f"class {title} has {len(ours)} samples and {len(theirs)} reference"
        " images, and each side needs two: make more, or leave --per_class out"
      )
    found[title] = metrics.frechet_distance(
      *_mean_and_covariance(theirs), *_mean_and_covariance(ours)
    )
  return found


def _mean_and_covariance(rows: np.ndarray) -> Gaussian:
  rows = rows.astype(np.float64)
  return rows.mean(0), np.cov(rows, rowvar=False)
