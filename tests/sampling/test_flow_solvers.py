"""The solvers of flow matching on data whose flow is known.

Of normal data, mean M and standard deviation S, the flow takes noise z to
(1 - t) M + sqrt((1 - t)^2 S^2 + t^2) z, so to M + S z at t = 0. Of two points,
-1 and 1 with probability P for 1, it takes z to 1 where the share of noise
above z is less than P: a flow on a line keeps the order of its points.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.diffusion import edm
from diffit_jax.errors import UserError
from diffit_jax.sampling import continuous
from slow import slow
import vp_problems as vp

M, S, P = 0.3, 0.5, 0.3
DETERMINISTIC = ("euler", "heun", "dpmpp_2m", "unipc")
Z = vp.noise_of(1, (4, 4, 4, 2))


def sample(denoiser, solver, z=Z, **options):
  named = sampling.process_options(solver, "flow")
  return sampling.sample(denoiser, solver, z, **named, **options)


def normal_data(x, t, xp=jnp):
  """E[y | x] of the normal data."""
  t = xp.asarray(t).reshape(-1, 1, 1, 1)
  a = 1 - t
  return M + a * S**2 / (a**2 * S**2 + t**2) * (x - a * M)


def two_points(x, t):
  t = t[:, None, None, None]
  logit = math.log(P / (1 - P)) / 2
  return jnp.tanh(logit + (1 - t) * x / t**2)


def curved(x, t, xp=jnp):
  """A denoiser that is no line, so that every mistake shows."""
  t = xp.asarray(t).reshape(-1, 1, 1, 1)
  return xp.sin(x) * (1.2 - t) + t * t


def orders(run, end, steps):
  return vp.measured_orders(run, end, steps)


@pytest.mark.parametrize(
  "solver, order, atol", [("euler", 1, 0.06), ("heun", 2, 0.1)]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_to_the_end_of_the_path(x64, solver, order, atol, shift):
  run = lambda n: sample(normal_data, solver, steps=n, shift=shift)
  found = orders(run, M + S * Z, (80, 160))
  np.testing.assert_allclose(found, order, atol=atol)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_order_of_multistep_solvers(x64, solver):
  """Steps even in t are long in ln t near clean data, their clock there.

  Step i from the end, of length h = ln (i+1)/i, adds t^2 h^3 or 1/(n^2 i) to
  DPM-Solver++'s error, in all ln n / n^2. UniPC's corrector is of one order
  more.
  """
  run = lambda n: sample(normal_data, solver, steps=n)
  (found,) = orders(run, M + S * Z, (80, 160))
  loss = np.log2(np.log(160) / np.log(80)) if solver == "dpmpp_2m" else 0
  assert 2 - loss - 0.1 < found < 2.2


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_two_points_are_told_apart(x64, solver):
  quantile = {0.3: 0.5244005127080407}[P]  # Phi^-1(1 - P)
  z = Z[np.abs(Z - quantile).reshape(len(Z), -1).min(1) > 1e-3]
  x = sample(two_points, solver, z, steps=300)
  clear = np.abs(z - quantile) > 0.05
  expected = np.where(z > quantile, 1.0, -1.0)
  np.testing.assert_allclose(np.asarray(x)[clear], expected[clear], atol=1e-6)


@pytest.mark.parametrize("solver", [*DETERMINISTIC, "euler_maruyama"])
@pytest.mark.parametrize("n", [1, 2, slow(3), slow(7)])
def test_both_ends_are_reached_without_nan(solver, n):
  """Pure noise gives the mean; the last step is the last prediction itself."""
  seen = []

  def denoiser(x, t):
    seen.append(None)
    return jnp.where(t[:, None, None, None] == 1, M, normal_data(x, t))

  keys = jax.random.split(jax.random.key(0), len(Z))
  x = sample(denoiser, solver, jnp.float32(Z), steps=n, keys=keys)
  assert x.dtype == jnp.float32 and np.isfinite(x).all() and len(seen) == 1
  if n == 1:
    np.testing.assert_allclose(x, M, rtol=1e-6)
  # One point is found in any number of steps.
  point = lambda x, t: jnp.full_like(x, 0.25)
  x = sample(point, solver, jnp.float32(Z), steps=n, keys=keys)
  np.testing.assert_allclose(x, 0.25, atol=1e-6)


def test_eulers_method_is_the_equation(x64):
  t, x = np.linspace(1, 0, 6), Z
  for now, then in zip(t, t[1:]):
    v = (x - curved(x, now, np)) / now
    x = x + (then - now) * v
  np.testing.assert_allclose(sample(curved, "euler", steps=5), x, rtol=1e-9)
  for solver, options in (
    ("unipc", dict(order=1, corrector=False)),
    ("euler_maruyama", dict(scale=0.0)),
  ):
    same = sample(curved, solver, steps=5, **options)
    np.testing.assert_allclose(same, x, rtol=1e-9)
  two = sample(curved, "dpmpp_2m", steps=2)
  np.testing.assert_allclose(two, sample(curved, "euler", steps=2), rtol=1e-9)


def test_heuns_method_is_the_equation(x64):
  shift = 2.0
  u = np.linspace(1, 0, 5)
  t, x = shift * u / (1 + (shift - 1) * u), Z
  slope = lambda x, t: (x - curved(x, t, np)) / t
  for now, then in zip(t, t[1:]):
    d = slope(x, now)
    x_end = x + (then - now) * d
    if then > 0:
      x_end = x + (then - now) * (d + slope(x_end, then)) / 2
    x = x_end
  found = sample(curved, "heun", steps=4, shift=shift)
  np.testing.assert_allclose(found, x, rtol=1e-9)
  assert sampling.make_solver("heun", 4).num_evaluations == 7


def test_the_stochastic_step_is_the_equation(x64):
  n, scale = 4, 0.7
  z = vp.noise_of(5, (n, *Z.shape))
  t, x = np.linspace(1, 0, n + 1), Z
  for i in range(n):
    d = t[i] - t[i + 1]
    D = curved(x, t[i], np)
    v, eps = (x - D) / t[i], (x - (1 - t[i]) * D) / t[i]
    g2 = min(scale * np.sin(np.pi * t[i]) ** 2, t[i] * t[i + 1] / d)  # (3)
    x = x - d * v - g2 * d * eps / (2 * t[i]) + np.sqrt(g2 * d) * z[i]
  found = sample(
      curved, "euler_maruyama", steps=n, diffusion="sin2", scale=scale,
      step_noise=z,
  )  # fmt: skip
  np.testing.assert_allclose(found, x, rtol=1e-9)


def moments(n, **options):
  """Mean and variance at t = 0 of normal data's samples, without sampling.

  Every step is affine in x and z, so both are propagated exactly.
  """
  rows = sampling.make_solver("euler_maruyama", n, **options).rows
  mean, variance = 0.0, 1.0
  for x, D, z, t in zip(rows["x"], rows["D"], rows["z"], rows["t"]):
    a = 1 - t
    slope = a * S**2 / (a**2 * S**2 + t**2)
    factor = x + D * slope
    mean = factor * mean + D * (M - slope * a * M)
    variance = factor**2 * variance + z**2
  return np.array([mean, variance])


@pytest.mark.parametrize("diffusion", ["sigma", "sin2"])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_weak_order_one(diffusion, scale):
  """Of the variance; the mean is exact, as every D is of its own step."""
  errors = np.array(
    [
      moments(n, diffusion=diffusion, scale=scale) - [M, S**2]
      for n in (200, 400)
    ]
  )
  np.testing.assert_allclose(errors[:, 0], 0, atol=1e-12)
  order = np.log2(errors[0, 1] / errors[1, 1])
  assert order == pytest.approx(1, abs=0.02)


def test_a_constant_diffusion_keeps_the_marginals_too():
  """Its drift is singular at t = 0, so no order is claimed."""
  np.testing.assert_allclose(
    moments(4000, diffusion="constant"), [M, S**2], atol=2e-3
  )


@pytest.mark.parametrize("diffusion", ["sigma", "sin2", "constant"])
@pytest.mark.parametrize("n", [10, 250, 2000])
def test_no_step_overshoots(diffusion, n):
  """The noise that is left, x - (1 - t) D with D held, stays of size t."""
  rows = sampling.make_solver("euler_maruyama", n, diffusion=diffusion).rows
  t, variance = np.append(rows["t"], 0.0), 1.0
  for i, (x, z) in enumerate(zip(rows["x"], rows["z"])):
    variance = x**2 * variance + z**2
    assert variance <= (2 * t[i + 1]) ** 2 + 1e-20


def test_strong_order_one(x64):
  """One Brownian path, refined: coarse increments are sums of fine ones."""
  finest, shape = 1024, (1, 8, 8, 4)
  z, fine = vp.noise_of(2, shape), vp.noise_of(3, (finest, *shape))

  def run(n):
    k = finest // n
    noise = fine.reshape(n, k, *shape).sum(1) / np.sqrt(k)
    return sample(
        normal_data, "euler_maruyama", z, steps=n, diffusion="sin2",
        step_noise=noise,
    )  # fmt: skip

  end = run(finest)
  errors = [np.sqrt(np.mean((run(n) - end) ** 2)) for n in (16, 32, 64)]
  ratios = np.log2(np.divide(errors[:-1], errors[1:]))
  np.testing.assert_allclose(ratios, 1, atol=0.15)


def test_an_edm_network_makes_the_same_image_through_a_flow(x64):
  """By D_flow(x; t) = D_edm(x / (1 - t); t / (1 - t)); order 2 apart."""
  process = edm.make({"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2})

  def network(x, c_noise):  # smooth in sigma, down to 0
    sigma = jnp.exp(4 * c_noise)[:, None, None, None]
    return jnp.sin(x + sigma / (1 + sigma))

  denoiser = lambda x, sigma: process.denoise(network, x, sigma)
  z = vp.noise_of()
  expected = sampling.sample(denoiser, "edm_heun", z, steps=800)

  def as_flow(x, t):
    return denoiser(x / (1 - t)[:, None, None, None], t / (1 - t))

  run = lambda n: sample(as_flow, "heun", z, steps=n, t_max=80 / 81)
  found = orders(run, expected, (25, 50, 100))
  np.testing.assert_allclose(found, 2, atol=0.25)


def test_the_shift_moves_steps_to_the_noise():
  levels = continuous.shares_of_noise(4, shift=3.0)
  np.testing.assert_allclose(levels, [1, 0.9, 0.75, 0.5, 0])
  levels = continuous.shares_of_noise(2, shift=3.0, t_max=0.5)
  np.testing.assert_allclose(levels, [0.5, 0.375, 0])


@pytest.mark.parametrize(
  "solver, options, message",
  [
    ("euler", dict(process="flow"), "'euler' has no option 'process'"),
    ("heun", dict(shift=0.0), "shift=0.0 must be from 0.001 to 1000"),
    ("euler", dict(t_max=0.0), "t_max=0.0 must be from 0.001 to 1"),
    ("heun", dict(shift="abc"), "shift='abc' must be a number"),
    ("heun", dict(shift=True), "shift=True must be a number"),
    ("euler_maruyama", dict(diffusion=[1]), r"diffusion=\[1\] must be a name"),
    ("unipc", dict(order=2.0), "order=2.0 must be a whole number"),
    ("unipc", dict(corrector="no"), "corrector='no' must be True or False"),
    ("ddim", dict(eta="abc"), "eta='abc' must be a number"),
    ("unipc", dict(process="flow", spacing="logsnr"), "no option 'spacing'"),
    ("dpmpp_2m", dict(process="edm"), "does not sample process='edm'"),
    ("euler_maruyama", dict(diffusion="x"), "allowed: sigma, constant, sin2"),
    ("euler_maruyama", dict(scale=-1.0), "scale=-1.0 must be at least 0"),
  ],
)
def test_wrong_options(solver, options, message):
  with pytest.raises(UserError, match=message):
    sampling.make_solver(solver, 4, **options)
