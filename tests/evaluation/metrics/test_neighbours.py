"""Radii and members in tiles, against all pairs in float64."""

import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import neighbours, precision_recall
from goldens import hfill
from slow import all_but


def pairs(x, y) -> np.ndarray:
  """[n_x, n_y] squared distances by differences, in float64."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return np.square(x[:, None] - y[None]).sum(-1)


def naive_radii(x, k=3) -> np.ndarray:
  return np.sort(pairs(x, x), 1)[:, k]


def naive(reference, samples, k=3) -> tuple[float, float]:
  """Precision and recall by (1)-(3) of the module, all pairs at once."""
  d2 = pairs(reference, samples)
  precision = (d2 <= naive_radii(reference, k)[:, None]).any(0).mean()
  recall = (d2 <= naive_radii(samples, k)).any(1).mean()
  return precision, recall


def radii(x, k=3, tile=2048) -> np.ndarray:
  """Squared radii of one set by the module, in the features' own unit."""
  frame = neighbours.frame_of(x, x)
  found = neighbours.squared_radii([*neighbours.cut(x, frame, tile)], k)
  return np.concatenate(found)[: len(x)] * frame.unit**2


def two_sets(n_r, n_s, d, seed=0, offset=0.3):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n_r, d)), offset + rng.normal(size=(n_s, d))


def test_golden_radii():
  # Float64 figures from a separate program.
  expected = {
    "ref": ((12, 3), 0.0, [2.789612, 0.502185, 0.696115]),
    "smp": ((10, 3), 0.6, [0.518291, 1.237422, 0.843258]),
  }
  for name, (shape, offset, start) in expected.items():
    found = radii(hfill(name, shape, 1) + offset)
    np.testing.assert_allclose(found[:3], start, atol=6e-7)


@pytest.mark.parametrize(
  "offset, expected", [(0.6, (0.7, 7 / 12)), (1.2, (0.3, 4 / 12))]
)
@pytest.mark.parametrize("tile", [1, 4, 2048])
def test_golden_precision_recall(offset, expected, tile):
  reference, samples = hfill("ref", (12, 3), 1), hfill("smp", (10, 3), 1)
  found = precision_recall(reference, samples + offset, tile_size=tile)
  assert found == pytest.approx(expected, rel=1e-12)


# Tiles of one point, that divide neither set, that divide both, of one part.
@pytest.mark.parametrize("tile", [7, 50, 64, 1000])
@pytest.mark.parametrize("k", all_but([3], [1, 3, 9]))
def test_tiles_equal_all_pairs(tile, k):
  reference, samples = two_sets(150, 100, 6)
  expected = naive(reference, samples, k)
  assert 0 < min(expected) and max(expected) < 1
  found = precision_recall(reference, samples, k, tile)
  assert found == pytest.approx(expected, rel=1e-12)
  np.testing.assert_allclose(
    radii(samples, k, tile), naive_radii(samples, k), rtol=1e-5
  )


def test_many_dimensions():
  """As many as the network's, of which 8 carry most, as in real features."""
  rng = np.random.default_rng(1)
  basis = rng.normal(size=(8, 2048))
  reference, samples = (
    x @ basis + 0.1 * rng.normal(size=(len(x), 2048))
    for x in two_sets(90, 60, 8)
  )
  expected = naive(reference, samples)
  assert 0 < expected[0] < 1 and 0 < expected[1] < 1
  found = precision_recall(reference, samples, tile_size=32)
  assert found == pytest.approx(expected, rel=1e-12)


def test_equal_and_far_sets():
  x, _ = two_sets(90, 4, 5)
  assert precision_recall(x, x, tile_size=32) == (1, 1)
  assert precision_recall(x, x + 1e3, tile_size=32) == (0, 0)


def test_what_is_not_symmetric():
  """Samples of one mode of two: precise, of half the recall."""
  x, _ = two_sets(200, 4, 3)
  x[100:] += 50
  precision, recall = precision_recall(x, x[:100])
  assert (precision, recall) == (1, 0.5)
  assert precision_recall(x[:100], x) == (0.5, 1)


def test_more_neighbours_never_lower_either():
  reference, samples = two_sets(120, 130, 8, offset=0.8)
  found = [precision_recall(reference, samples, k) for k in (1, 3, 8)]
  assert (np.diff(found, axis=0) >= 0).all() and found[0] != found[-1]


def test_moved_apart_neither_rises():
  reference, samples = two_sets(200, 200, 8, offset=0)
  found = [
    precision_recall(reference, samples + shift) for shift in (0, 2, 4, 8)
  ]
  assert (np.diff(found, axis=0) <= 0).all()
  assert min(found[0]) > 0.5 and found[-1] == (0, 0)


# Offsets that float32 distances of the numbers themselves would not survive,
# and units in which their squares would overflow and underflow.
@pytest.mark.parametrize("offset, unit", [(1e4, 1), (0, 1e25), (0, 1e-25)])
def test_offset_and_unit_change_nothing(offset, unit):
  reference, samples = two_sets(150, 150, 6)
  expected = naive(reference, samples)
  found = precision_recall(
    reference * unit + offset, samples * unit + offset, tile_size=60
  )
  assert found == pytest.approx(expected, rel=1e-12)


def test_the_surface_belongs_to_the_ball():
  """0, 1, 2, ...: k = 3 reaches 3 at the ends; a tie of radius and distance.

  The set's mean, 1000 + 50/11, has no end in binary: subtracted as it is, it
  would leave neither tie standing.
  """
  reference = np.array([0.0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9])[:, None] + 1000
  inside = np.array([[-3.0], [12], [4], [5]]) + 1000
  outside = np.array([[-3.001], [12.001], [50], [60]]) + 1000
  assert precision_recall(reference, inside)[0] == 1
  assert precision_recall(reference, outside)[0] == 0


@pytest.mark.parametrize("tile", all_but([7], [3, 7, 100]))
def test_copies(tile):
  """Points with k or more copies have radius 0 and still contain their like."""
  rng = np.random.default_rng(0)
  points = rng.normal(size=(5, 300))
  reference = np.repeat(points, 4, axis=0)  # each with 3 copies
  np.testing.assert_array_equal(radii(reference, 3, tile), 0)
  assert radii(reference, 4, tile).min() > 100
  samples = np.concatenate([points, points + 1e-2])
  precision, _ = precision_recall(reference, samples, tile_size=tile)
  assert precision == 0.5
  alike = np.full((6, 3), 0.1)
  assert precision_recall(alike, alike) == (1, 1)
  assert precision_recall(alike, alike + 1)[0] == 0


def test_refusals():
  x = np.random.default_rng(0).normal(size=(4, 2))
  assert precision_recall(x, x) == (1, 1)  # k + 1 points are enough
  with pytest.raises(UserError, match="need 4 or more .* not 4 of .* and 3 sa"):
    precision_recall(x, x[:3])
  with pytest.raises(UserError, match="need 4 or more"):
    precision_recall(x[:0], x)
  with pytest.raises(UserError, match="k=0"):
    precision_recall(x, x, k=0)
  with pytest.raises(UserError, match="have 2 dimensions, those .* 1"):
    precision_recall(x, x[:, :1])
  with pytest.raises(UserError, match="of the samples hold an infinity"):
    precision_recall(x, np.where(x == x.max(), np.inf, x))
