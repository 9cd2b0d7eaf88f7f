"""Who lies within whose neighbourhood: distances between two sets, in tiles.

Kynkäänniemi et al. 2019 ("Improved precision and recall metric for assessing
generative models", Section 2): the manifold of a set is the union of balls
around its points, each reaching its point's k-th nearest neighbour.

  d2(u, v) = |u|^2 + |v|^2 - 2 u.v                                           (1)
  r2(u) = d2 to the k-th nearest of the other points of its set              (2)
  v is inside the set if d2(u, v) <= r2(u) for at least one u of it          (3)

Only [tile, tile] distances exist at a time. Each tile of one set against
itself serves the rows and, as distances are symmetric, the columns; each tile
of the one set against the other answers (3) in both directions. That is
n_a^2 / 2 + n_b^2 / 2 + n_a n_b distances in all.

Distances are float32, so (1) is made harmless first: both sets are moved by
about the mean of the first and divided by about their spread, which changes
nothing in (3). Move and unit are powers of two times integers, which leaves
ties between numbers of few bits exact.

CHOICE: a distance that is below the rounding error of (1) counts as 0. Copies
of a point are then at distance 0 from each other, wherever in a tile they fall.
"""

from collections.abc import Iterable, Iterator
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

TILE = 2048  # points; as fast as 4096 with a quarter of the memory


@dataclasses.dataclass(frozen=True)
class Frame:
  """The coordinates that distances are computed in: (x - shift) / unit.

  Attributes:
    shift: [d] float64.
    unit: a power of two.
  """

  shift: np.ndarray
  unit: float


@dataclasses.dataclass(frozen=True)
class Tiles:
  """A set in equal parts; the last is filled up with points at infinity.

  Attributes:
    num: true number of points.
    points: [b, d] float32 each.
    norms: [b] float32 each, |u|^2; infinite for filling.
  """

  num: int
  points: list[jax.Array]
  norms: list[jax.Array]

  def __len__(self) -> int:
    return len(self.points)

  def __getitem__(self, i: int) -> tuple[jax.Array, jax.Array]:
    return self.points[i], self.norms[i]


def frame_of(first: np.ndarray, second: np.ndarray) -> Frame:
  """Coordinates with the first set's mean near 0 and both spreads below 2."""
  mean = first.mean(axis=0, dtype=np.float64)
  grid = _power_of_two(_spread(first, mean))
  shift = np.round(mean / grid) * grid if grid else mean
  spread = max(_spread(first, shift), _spread(second, shift))
  return Frame(shift, _power_of_two(spread) or 1.0)


def to_tiles(x: np.ndarray, frame: Frame, tile: int = TILE) -> Tiles:
  """Cuts [n, d] points into as few equal parts of at most `tile` as do."""
  points, norms = zip(*stream_tiles(x, frame, tile))
  return Tiles(len(x), list(points), list(norms))


def stream_tiles(
  x: np.ndarray, frame: Frame, tile: int = TILE
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """The parts of `to_tiles` one by one, (points, norms) each."""
  size = -(-len(x) // -(-len(x) // tile))
  for part in _parts(x, size):
    points = np.zeros((size, x.shape[1]), np.float32)
    points[: len(part)] = (part - frame.shift) / frame.unit
    norms = np.full(size, np.inf, np.float32)
    norms[: len(part)] = np.square(points[: len(part)], dtype=np.float64).sum(1)
    yield jnp.asarray(points), jnp.asarray(norms)


def squared_radii(x: Tiles, k: int) -> list[jax.Array]:
  """(2) for every part, [b] float32 in units of the frame; -1 for filling.

  k-th of the others is index k of the sorted distances that include the
  point's own, 0: a point with k copies has radius 0.
  """
  size = len(x.norms[0])
  nearest = [jnp.full((size, k + 1), jnp.inf) for _ in range(len(x))]
  for i in range(len(x)):
    nearest[i] = _nearest_within(nearest[i], x[i])
    for j in range(i + 1, len(x)):
      nearest[i], nearest[j] = _nearest_between(
        nearest[i], nearest[j], x[i], x[j]
      )
  return [
    jnp.where(jnp.isinf(norms), -1, found[:, k])
    for norms, found in zip(x.norms, nearest)
  ]


def mutual_members(
  x: Tiles,
  x_radii: list[jax.Array],
  y: Iterable[tuple[jax.Array, jax.Array]],
  y_radii: list[jax.Array],
) -> tuple[np.ndarray, np.ndarray]:
  """(3) both ways: which of x are inside y, which of y are inside x.

  Args:
    x: the one set, held whole.
    x_radii: of it.
    y: parts of the other set, as from `stream_tiles`: one at a time is held.
    y_radii: of it.

  Returns:
    [n_x] bool, and bool of y's points and, behind them, its filling.
  """
  in_y = [jnp.zeros(len(norms), bool) for norms in x.norms]
  in_x = [jnp.zeros(len(radii), bool) for radii in y_radii]
  for j, part in enumerate(y):
    for i in range(len(x)):
      in_y[i], in_x[j] = _members(
        in_y[i], in_x[j], x[i], x_radii[i], part, y_radii[j]
      )
  return np.concatenate(in_y)[: x.num], np.concatenate(in_x)


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
  """Takes in the distances of a part to itself."""
  own = jnp.eye(len(nearest), dtype=bool)
  return _merge(nearest, jnp.where(own, 0.0, _distances(x, x)))


@jax.jit
def _nearest_between(x_nearest, y_nearest, x, y):
  """Takes in the distances between two parts of one set, for both."""
  distances = _distances(x, y)
  return _merge(x_nearest, distances), _merge(y_nearest, distances.T)


@jax.jit
def _members(in_y, in_x, x, x_radii, y, y_radii):
  """Adds to the members so far those by the distances of two parts."""
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
