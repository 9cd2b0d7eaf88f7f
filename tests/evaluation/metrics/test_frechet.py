"""The Fréchet distance: closed forms and plain float64."""

from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import frechet, frechet_distance
from diffit_jax.evaluation.metrics.moments import Moments


def moments_of(x) -> tuple[np.ndarray, np.ndarray]:
  return x.mean(0), np.cov(x, rowvar=False)


def features(n: int, d: int, seed: int, decay: float = 0.0) -> np.ndarray:
  """[n, d] correlated features; `decay` orders of magnitude of deviations."""
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(n, d)) * np.logspace(0, -decay, d)
  return mixed @ rng.normal(size=(d, d)) / np.sqrt(d) + 0.1 * rng.normal(size=d)


def by_matrix_root(mu1, sigma1, mu2, sigma2) -> float:
  """(1) of the module as it stands, with scipy's general matrix root."""
  root = np.real(linalg.sqrtm(sigma1 @ sigma2))
  return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)


def by_factors(x, y) -> float:
  """(1) from centred data: Sigma = A A^T, trace term = nuclear norm of A^T B.

  Uses no covariance, hence squares no condition number.
  """
  a, b = ((v - v.mean(0)) / np.sqrt(len(v) - 1) for v in (x, y))
  cross = np.linalg.norm(a @ b.T, "nuc")
  traces = np.sum(a**2) + np.sum(b**2)
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + traces - 2 * cross


def test_frechet_golden():
  # A float64 figure from a separate program.
  found = frechet_distance(
    [0, 0], [[1, 0.2], [0.2, 2]], [1, -1], [[1.5, -0.3], [-0.3, 0.8]]
  )
  assert found == pytest.approx(2.429688695453, abs=1e-12)
  assert isinstance(found, float)


def test_frechet_in_one_dimension():
  """(m1 - m2)^2 + (s1 - s2)^2."""
  assert frechet_distance([1], [[4]], [3], [[25]]) == pytest.approx(13)


@pytest.mark.parametrize("decay", [0, 1.5])
def test_frechet_equals_the_matrix_root(decay):
  a = moments_of(features(400, 40, 0, decay))
  b = moments_of(features(300, 40, 1, decay) * 1.1)
  assert frechet_distance(*a, *b) == pytest.approx(
    by_matrix_root(*a, *b), rel=1e-9
  )


# [n1, n2] of 64 dimensions: singular both, either, neither, of rank 1.
@pytest.mark.parametrize(
  "n1, n2", [(20, 30), (20, 500), (500, 20), (500, 400), (2, 2), (2, 300)]
)
@pytest.mark.parametrize("decay", [0, 4])
def test_frechet_of_singular_covariances(n1, n2, decay):
  """Deviations over `decay` orders, covariances over twice as many."""
  x, y = features(n1, 64, 0, decay), features(n2, 64, 1, decay)
  expected = by_factors(x, y)
  found = frechet_distance(*moments_of(x), *moments_of(y))
  assert found == pytest.approx(expected, rel=1e-7)
  backward = frechet_distance(*moments_of(y), *moments_of(x))
  assert backward == pytest.approx(expected, rel=1e-7)


def test_frechet_of_copied_columns():
  x, y = features(300, 16, 0), features(200, 16, 1)
  x, y = np.tile(x, 4), np.tile(y, 4)
  found = frechet_distance(*moments_of(x), *moments_of(y))
  assert found == pytest.approx(by_factors(x, y), rel=1e-9)


def test_frechet_of_commuting_covariances():
  """sum (sqrt a - sqrt b)^2 in any common basis, zeros included."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(50, 50)))[0]
  a, b = rng.uniform(0, 2, (2, 50))
  a[:10], b[5:20] = 0, 0
  a[20], b[21] = 1e-9, 1e-9  # and nearly
  sigmas = [(basis * v) @ basis.T for v in (a, b)]
  zero = np.zeros(50)
  found = frechet_distance(zero, sigmas[0], zero, sigmas[1])
  expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [2, 20, 500])
def test_frechet_to_itself_is_zero(n):
  mu, sigma = moments_of(features(n, 64, 0, decay=2))
  found = frechet_distance(mu, sigma, mu, sigma)
  assert 0 <= found < 1e-12 * np.trace(sigma)
  moved = frechet_distance(mu, sigma, mu + 0.5, sigma)
  assert moved == pytest.approx(64 * 0.25, rel=1e-12)  # translation


def test_frechet_is_equivariant():
  x, y = features(100, 24, 0), features(90, 24, 1)
  value = frechet_distance(*moments_of(x), *moments_of(y))
  scaled = frechet_distance(*moments_of(7 * x), *moments_of(7 * y))
  assert scaled == pytest.approx(49 * value, rel=1e-10)
  basis = np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))[0]
  turned = frechet_distance(*moments_of(x @ basis), *moments_of(y @ basis))
  assert turned == pytest.approx(value, rel=1e-10)
  shifted = frechet_distance(*moments_of(x + 9), *moments_of(y + 9))
  assert shifted == pytest.approx(value, rel=1e-10)


def test_frechet_of_moments_in_float32():
  """Stored in float32 a singular covariance has eigenvalues below 0."""
  x, y = features(20, 64, 0), features(30, 64, 1)
  exact = by_factors(x, y)
  stored = [jnp.float32(v) for v in (*moments_of(x), *moments_of(y))]
  assert frechet_distance(*stored) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("n", [2, 20, 65, 2000])
@pytest.mark.parametrize("decay", [0, 2, 4])
def test_both_ways_to_factor_agree(n, decay):
  """Every covariance in float64 takes the fast one."""
  sigmas = [moments_of(features(n, 64, seed, decay))[1] for seed in (0, 1)]
  slow = [frechet._factor_by_eigenvalues(sigma, "") for sigma in sigmas]
  with mock.patch.object(frechet, "_factor_by_eigenvalues", None):
    fast = [frechet._factor(sigma, "") for sigma in sigmas]
  for factor, other, sigma in zip(fast, slow, sigmas):
    assert factor.shape[1] == other.shape[1] or decay == 4  # at the threshold
    off = np.abs(factor @ factor.T - sigma).max()
    assert off < 1e-14 * 64 * np.abs(sigma).max()
  nuclear = [np.linalg.norm(a.T @ b, "nuc") for a, b in (fast, slow)]
  assert nuclear[0] == pytest.approx(nuclear[1], rel=1e-7)


def test_frechet_reads_both_triangles():
  """A covariance that rounding left a little asymmetric counts as its mean."""
  mu, sigma = moments_of(features(100, 8, 0))
  other = moments_of(features(100, 8, 1))
  skewed = sigma * (1 + 1e-4 * np.triu(np.ones((8, 8)), 1))
  found = frechet_distance(mu, skewed, *other)
  assert found == pytest.approx(
    frechet_distance(mu, (skewed + skewed.T) / 2, *other), rel=1e-12
  )
  assert abs(found / frechet_distance(mu, sigma, *other) - 1) > 1e-9


def test_frechet_of_streamed_features():
  x, y = features(2100, 20, 0), features(80, 20, 1)
  streams = []
  for v in (x, y):
    stream = Moments(20)
    for start in range(0, len(v), 64):
      stream.update(v[start : start + 64])
    streams += [stream.mean, stream.covariance()]
  assert frechet_distance(*streams) == pytest.approx(by_factors(x, y), rel=1e-9)


def test_frechet_refusals():
  mu, eye = np.zeros(2), np.eye(2)
  with pytest.raises(UserError, match="sets have 2 and 3 dimensions"):
    frechet_distance(mu, eye, np.zeros(3), np.eye(3))
  with pytest.raises(
    UserError, match=r"second set must .* \(2,\) and \(3, 3\)"
  ):
    frechet_distance(mu, eye, mu, np.eye(3))
  with pytest.raises(UserError, match="first set must be"):
    frechet_distance(eye, eye, mu, eye)
  with pytest.raises(UserError, match="second set is not finite"):
    frechet_distance(mu, eye, mu, [[1, np.nan], [np.nan, 1]])
  with pytest.raises(UserError, match="first set is not finite"):
    frechet_distance([0, np.inf], eye, mu, eye)
  with pytest.raises(UserError, match="first set is not symmetric"):
    frechet_distance(mu, [[1, 0.5], [0, 1]], mu, eye)
  with pytest.raises(UserError, match="second set has the eigenvalue -1 "):
    frechet_distance(mu, eye, mu, [[0, 1], [1, 0]])
