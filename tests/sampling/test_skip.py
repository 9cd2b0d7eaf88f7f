"""Stretches of evaluations without guidance: same samples, less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import AS_USERS
from diffit_jax import sampling
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.errors import UserError
from slow import all_but
import vp_problems as vp

LABELS = jnp.array([1, 0, 2])
RUNS = {  # solver: options, an interval of its levels
  "edm_heun": (dict(steps=9), (0.1, 10.0)),
  "ddpm": (dict(steps=12), (200, 700)),
  "ddim": (dict(steps=12, eta=0.5), (200, 700)),
  "dpmpp_2m": (dict(steps=12), (20, 700)),
  "unipc": (dict(steps=12, order=3), (20, 700)),
}


def network(x, level, labels):
  """Depends on its label; batches of b and 2b are told apart by their rows."""
  labels = labels[:, None, None, None]
  scale = 1 / (1 + level[:, None, None, None] ** 2)
  return jnp.sin(x + labels) * scale + 0.1 * labels * x


def both(rows=None, network=network, **cfg):
  """The denoiser with guidance and the one without; rows collects theirs."""

  def counted(x, level, labels):
    if rows is not None:
      rows.append(len(x))
    return network(x, level, labels)

  return (
    Guidance(**cfg).denoiser(counted, LABELS, 3),
    Guidance().denoiser(counted, LABELS, 3),
  )


@pytest.mark.parametrize("solver", all_but({"edm_heun", "ddim", "unipc"}, RUNS))
def test_interval_of_guidance(solver):
  options, interval = RUNS[solver]
  cfg = dict(scale=2.5, interval=interval)
  skip = Guidance(**cfg).skippable
  rows = []
  guided, plain = both(rows, **cfg)

  def run(z, e, **split):
    return sampling.sample(guided, solver, z, step_noise=e, **options, **split)

  z, e = vp.noise_of(), vp.noise_of(1, (12, *vp.SHAPE))
  jit = functools.partial(jax.jit, compiler_options=AS_USERS)
  split = jit(functools.partial(run, plain=plain, skip=skip))(z, e)
  # Off, on, off: each stretch is traced once, with b, 2b and b rows.
  assert rows == [3, 6, 3]
  whole = jit(run)(z, e)
  assert rows[3:] == [6]
  # u + 1 (c - u) is c to rounding; this network makes numbers of 1000 and more.
  largest = np.abs(whole).max()
  np.testing.assert_allclose(split / largest, whole / largest, atol=4e-6)

  levels = sampling.make_solver(solver, **options).levels
  outside = (levels < interval[0]) | (levels > interval[1])
  np.testing.assert_array_equal(skip(levels), outside)
  assert 0 < outside.sum() < len(levels)
  assert (
    sampling.make_solver(solver, **options).num_skipped(skip) == outside.sum()
  )

  # The interval matters, and so does what is within.
  everywhere, _ = both(scale=2.5)
  nowhere, _ = both(scale=1.0)
  for other in (everywhere, nowhere):
    x = sampling.sample(other, solver, z, step_noise=e, **options)
    assert np.abs(x - whole).max() > 0.01


@pytest.mark.parametrize("solver", all_but({"edm_heun", "ddim", "unipc"}, RUNS))
def test_carry_and_draws_pass_from_stretch_to_stretch(solver):
  """With one denoiser in all stretches they are the whole, bit for bit."""
  options, interval = RUNS[solver]
  _, plain = both(scale=2.0)
  skip = Guidance(scale=2.0, interval=interval).skippable
  run = lambda **split: sampling.sample(
      plain, solver, vp.noise_of(), **options, **split,
      step_noise=vp.noise_of(1, (12, *vp.SHAPE)),
  )  # fmt: skip
  np.testing.assert_array_equal(run(plain=plain, skip=skip), run())


def test_power_cosine_skips_high_noise():
  cfg = dict(scale=4.4, schedule="power_cosine")
  skip = Guidance(**cfg).skippable
  rows = []
  guided, plain = both(
    rows, lambda x, t, labels: network(x, t / 1000, labels), **cfg
  )
  z = vp.noise_of()
  run = lambda skip: jax.jit(
    lambda z: sampling.sample(
      guided, "ddim", z, steps=250, plain=plain, skip=skip
    )
  )(z)
  exact = run(skip)
  assert rows == [3, 6]
  whole = run(lambda levels: np.zeros(len(levels), bool))
  assert rows[2:] == [6]
  largest = np.abs(whole).max()
  np.testing.assert_allclose(exact / largest, whole / largest, atol=4e-6)
  # A tolerance changes samples by about as much as it says.
  loose = run(Guidance(**cfg, tolerance=1e-3).skippable)
  assert 1e-6 < np.abs(loose - whole).max() / largest < 5e-3


@pytest.mark.parametrize(  # of 250, the paper's preset
  "tolerance, skipped", [(0.0, 24), (1e-4, 61), (1e-3, 81), (1e-2, 108)]
)
def test_how_much_power_cosine_skips(tolerance, skipped):
  rule = Guidance(4.4, schedule="power_cosine", tolerance=tolerance)
  assert (
    sampling.make_solver("ddpm", 250).num_skipped(rule.skippable) == skipped
  )
  # By hand: |s - 1| = 3.4 sin(pi/2 c^4)^2 <= tolerance, c = 1 - t/1000, where
  # float32 knows no smaller s - 1 than 6e-8, half of the distance to the next.
  bound = max(tolerance, 2.0**-24)
  c = (np.arcsin(np.sqrt(bound / 3.4)) * 2 / np.pi) ** 0.25
  t = np.rint(np.arange(250) * 999 / 249)
  assert np.sum(t >= 1000 * (1 - c)) == skipped


def test_all_or_nothing_is_one_stretch():
  rows = []
  guided, plain = both(rows, scale=2.0)
  for value, expected in ((True, 3), (False, 6)):
    sampling.sample(
        guided, "ddim", vp.noise_of(), steps=5, plain=plain,
        skip=lambda levels, value=value: np.full(len(levels), value),
    )  # fmt: skip
    assert rows.pop() == expected and not rows


def test_levels_that_go_to_and_fro_cost_few_stretches():
  """Churn raises noise over an end of the interval again and again."""
  options = dict(steps=200, S_churn=60.0)
  levels = sampling.make_solver("edm_heun", **options).levels
  skip = Guidance(scale=2.0, interval=(1.0, 20.0)).skippable
  assert np.count_nonzero(np.diff(skip(levels))) > 4
  rows = []
  guided, plain = both(rows, scale=2.0, interval=(1.0, 20.0))
  sampling.sample(
      guided, "edm_heun", vp.noise_of(), plain=plain, skip=skip,
      step_noise=vp.noise_of(1, (200, *vp.SHAPE)), **options,
  )  # fmt: skip
  assert rows == [3, 6, 3]
  skipped = sampling.make_solver("edm_heun", **options).num_skipped(skip)
  lost = skip(levels).sum() - skipped
  assert 0 < lost < 0.05 * len(levels)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(plain=vp.curved), "plain and skip belong together"),
    (
      dict(skip=lambda levels: np.zeros(4, bool)),
      "plain and skip belong together",
    ),
    (
      dict(plain=vp.curved, skip=lambda levels: np.zeros(3, bool)),
      r"skip gave bool \(3,\) for 4 levels",
    ),
    (
      dict(plain=vp.curved, skip=lambda levels: levels),
      r"skip gave int64 \(4,\) for 4 levels",
    ),
  ],
)
def test_mistakes(kwargs, message):
  with pytest.raises(UserError, match=message):
    sampling.sample(vp.curved, "ddim", jnp.zeros(vp.SHAPE), steps=4, **kwargs)
