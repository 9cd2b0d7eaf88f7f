"""Precision and recall: which points lie within which neighbourhoods.

Kynkäänniemi et al. 2019 ("Improved precision and recall metric for assessing
generative models", Section 2): the manifold of a set is the union of balls
around its points, each reaching its point's k-th nearest neighbour.

  d2(u, v) = |u|^2 + |v|^2 - 2 u.v                                           (1)
  r2(u) = d2 to the k-th nearest of the other points of its set              (2)
  v is inside the set if d2(u, v) <= r2(u) for at least one u of it          (3)

Sets are cut into tiles, and only [tile, tile] distances exist at a time. Those
between two tiles of one set serve both, as distances are symmetric; those
between a tile of one set and a tile of the other answer (3) in both directions.
That is n_a^2 / 2 + n_b^2 / 2 + n_a n_b distances in all.

Distances are float32. So that (1) loses no digits, both sets are first moved by
about the mean of the first and divided by about their spread, which changes
nothing in (3). Move and unit are powers of two times integers, which leaves
ties between numbers of few bits exact.

CHOICE: a distance that is below the rounding error of (1) counts as 0. Copies
of a point are then at distance 0 from each other, at any place in a tile.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics.feature_checks import check_pair

Tile = tuple[jax.Array, jax.Array]  # points [b, d] and norms [b], |u|^2
TILE = 2048  # points; as fast as 4096 with a quarter of the memory


def precision_and_recall(samples, reference) -> dict[str, float]:
  """Two rows of the table, which one computation gives."""
  precision, recall = precision_recall(reference.rows, samples.rows())
  return {"precision": precision, "recall": recall}


def precision_recall(
  reference, samples, k: int = 3, tile_size: int = TILE
) -> tuple[float, float]:
  """Improved precision and recall, from float32 squared distances.

  A ball reaches its point's k-th nearest neighbour within its set, not counting
  the point itself, and includes its surface.

  Args:
    reference: [n_r, d] features of real images.
    samples: [n_s, d] features of generated images.
    k: number of neighbours.
    tile_size: points at a time; memory and speed only.

  Returns:
    precision: share of samples inside at least one ball of the reference.
    recall: share of the reference inside at least one ball of the samples.

  Raises:
    UserError: fewer than k + 1 points in a set, or arrays that are not
      features.
  """
  reference, samples = check_pair(reference, samples)
  if k < 1 or tile_size < 1:
    raise UserError(f"{k=} and {tile_size=} must be 1 or more")
  if min(len(reference), len(samples)) < k + 1:
    raise UserError(
      f"precision and recall with {k=} need {k + 1} or more points in each set,"
      f" not {len(reference)} of the reference and {len(samples)} samples"
    )
  frame = frame_of(reference, samples)
  # One set at a time in tiles, which are a copy of it.
  radii = squared_radii([*cut(reference, frame, tile_size)], k)
  held = [*cut(samples, frame, tile_size)]
  in_reference, in_samples = mutual_members(
    held, squared_radii(held, k), cut(reference, frame, tile_size), radii
  )
  in_reference = in_reference[: len(samples)]
  in_samples = in_samples[: len(reference)]
  return float(in_reference.mean()), float(in_samples.mean())


@dataclasses.dataclass(frozen=True)
class Frame:
  """The coordinates that distances are computed in: (x - shift) / unit.

  Attributes:
    shift: [d] float64.
    unit: a power of two.
  """

  shift: np.ndarray
  unit: float


def frame_of(first: np.ndarray, second: np.ndarray) -> Frame:
  """Coordinates with the first set's mean near 0 and both spreads below 2."""
  mean = first.mean(axis=0, dtype=np.float64)
  grid = _power_of_two(_spread(first, mean))
  shift = np.round(mean / grid) * grid if grid else mean
  spread = max(_spread(first, shift), _spread(second, shift))
  return Frame(shift, _power_of_two(spread) or 1.0)


def cut(x: np.ndarray, frame: Frame, tile: int = TILE) -> Iterator[Tile]:
  """Cuts [n, d] points into the fewest equal tiles of at most `tile` points.

  The last one is filled up with points at infinity.
  """
  size = -(-len(x) // -(-len(x) // tile))
  for part in _parts(x, size):
    points = np.zeros((size, x.shape[1]), np.float32)
    points[: len(part)] = (part - frame.shift) / frame.unit
    norms = np.full(size, np.inf, np.float32)
    norms[: len(part)] = np.square(points[: len(part)], dtype=np.float64).sum(1)
    yield jnp.asarray(points), jnp.asarray(norms)


def squared_radii(x: Sequence[Tile], k: int) -> list[jax.Array]:
  """(2) for every tile, [b] float32 in units of the frame; -1 for filling.

  The k-th of the others has index k among the sorted distances, which include
  the point's own, 0: a point with k copies has radius 0.
  """
  size = len(x[0][1])
  nearest = [jnp.full((size, k + 1), jnp.inf) for _ in range(len(x))]
  for i in range(len(x)):
    nearest[i] = _nearest_within(nearest[i], x[i])
    for j in range(i + 1, len(x)):
      nearest[i], nearest[j] = _nearest_between(
        nearest[i], nearest[j], x[i], x[j]
      )
  return [
    jnp.where(jnp.isinf(norms), -1, found[:, k])
    for (_, norms), found in zip(x, nearest)
  ]


def mutual_members(
  x: Sequence[Tile],
  x_radii: list[jax.Array],
  y: Iterable[Tile],
  y_radii: list[jax.Array],
) -> tuple[np.ndarray, np.ndarray]:
  """(3) both ways: which of x are inside y, which of y are inside x.

  Args:
    x: tiles of the one set, all in memory.
    x_radii: its `squared_radii`.
    y: tiles of the other set; one at a time is in memory.
    y_radii: its `squared_radii`.

  Returns:
    bool for all points of x, then its filling; and the same for y.
  """
  in_y, in_x = (
    [jnp.zeros(len(radii), bool) for radii in each]
    for each in (x_radii, y_radii)
  )
  for j, part in enumerate(y):
    for i in range(len(x)):
      in_y[i], in_x[j] = _members(
        in_y[i], in_x[j], x[i], x_radii[i], part, y_radii[j]
      )
  return np.concatenate(in_y), np.concatenate(in_x)


def _distances(x, y) -> jax.Array:
  """(1), [b_x, b_y] float32; infinite where either is filling."""
  (u, u_norms), (v, v_norms) = x, y
  products = jnp.dot(u, v.T, precision=lax.Precision.HIGHEST)
  norms = u_norms[:, None] + v_norms
  # Rounding of a sum of d terms; its sign is random, so it grows as a root.
  noise = np.finfo(np.float32).eps * max(4.0, u.shape[1] ** 0.5)
  distances = norms - 2 * products
  return jnp.where(distances < noise * norms, 0.0, distances)


def _merge(nearest: jax.Array, distances: jax.Array) -> jax.Array:
  """[b, k + 1]: the smallest of each row of both, in ascending order."""
  num = nearest.shape[1]
  here = lax.top_k(-distances, min(num, distances.shape[1]))[0]
  return -lax.top_k(jnp.concatenate([-nearest, here], axis=1), num)[0]


@jax.jit
def _nearest_within(nearest, x):
  """Merges the distances of a tile to itself."""
  own = jnp.eye(len(nearest), dtype=bool)
  return _merge(nearest, jnp.where(own, 0.0, _distances(x, x)))


@jax.jit
def _nearest_between(x_nearest, y_nearest, x, y):
  """Merges the distances between two tiles of one set, for both."""
  distances = _distances(x, y)
  return _merge(x_nearest, distances), _merge(y_nearest, distances.T)


@jax.jit
def _members(in_y, in_x, x, x_radii, y, y_radii):
  """Adds the members that the distances of two tiles show."""
  distances = _distances(x, y)
  in_y |= (distances <= y_radii).any(axis=1)
  in_x |= (distances <= x_radii[:, None]).any(axis=0)
  return in_y, in_x


def _parts(x: np.ndarray, size: int = TILE) -> Iterator[np.ndarray]:
  """Consecutive rows, `size` at a time."""
  for start in range(0, len(x), size):
    yield x[start : start + size]


def _spread(x: np.ndarray, center: np.ndarray) -> float:
  """Root mean square of all of x - center, float64."""
  return np.sqrt(sum(np.square(p - center).sum() for p in _parts(x)) / x.size)


def _power_of_two(value: float) -> float:
  """The largest one that is not above the value; 0 for 0."""
  return float(np.ldexp(1.0, np.frexp(value)[1] - 1)) if value else 0.0
