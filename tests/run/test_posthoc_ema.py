"""Power-function averages: profiles, and any width made after training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.parallel import sharding
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.run import ema, posthoc, snapshots, storage
from diffit_jax.run.posthoc import Profile
from diffit_jax.training import checks
from slow import slow

WIDTHS = (0.05, 0.10)


def profile(tau, p: Profile):
  """p(tau; gamma, t), (3) of `ema`, zero after t."""
  gamma = ema.gamma_of(p.sigma_rel)
  inside = np.minimum(tau, p.step) / p.step
  return (gamma + 1) * inside**gamma / p.step * (tau <= p.step)


def direct(trajectory: np.ndarray, p: Profile) -> np.ndarray:
  """The average itself in float64: each step's share is its integral (6)."""
  gamma = ema.gamma_of(p.sigma_rel)
  share = (np.arange(p.step + 1) / p.step) ** (gamma + 1)
  return np.diff(share) @ trajectory[: p.step]


def trajectory(steps: int, seed: int = 0) -> np.ndarray:
  """[steps, 20]: a decaying drift with noise, as weights in training."""
  rng = np.random.default_rng(seed)
  drift = np.exp(-np.arange(steps)[:, None] / (steps * rng.uniform(0.1, 1, 20)))
  walk = np.cumsum(rng.normal(size=(steps, 20)), 0) / np.sqrt(steps)
  return 3 * drift + walk + 0.1 * rng.normal(size=(steps, 20))


# The paper's exponents of its two widths (Karras et al. 2024, Section 3.1).
@pytest.mark.parametrize("width, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_golden(width, gamma):
  assert round(ema.gamma_of(width), 2) == gamma


@pytest.mark.parametrize("width", [0.01, 0.05, 0.08, 0.10, 0.25, 12**-0.5])
def test_width_is_the_deviation_of_the_profile(width):
  p = Profile(width, 1)
  moment = lambda n: integrate.quad(lambda x: x**n * profile(x, p), 0, 1)[0]
  np.testing.assert_allclose(moment(0), 1, rtol=1e-9)
  np.testing.assert_allclose(
    np.sqrt(moment(2) - moment(1) ** 2), width, rtol=1e-6
  )


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3, 5.0, float("nan")])
def test_widths_that_are_none(width):
  with pytest.raises(UserError, match="must be above 0 and at most 0.2887"):
    ema.gamma_of(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_updates_are_the_integral_of_the_profile(width):
  """300 float32 updates equal the sum that (6) writes out, for any weights."""
  steps, rule = 300, dict(kind="power", sigma_rel=width)
  weights = trajectory(steps)

  @jax.jit
  def run(weights):
    def one(average, step_and_w):
      step, w = step_and_w
      return ema.update(average, w, ema.gain(rule, step, 8)), None

    start = jnp.full(20, 1e3)  # is forgotten by the first step
    return jax.lax.scan(one, start, (jnp.arange(steps), weights))[0]

  expected = direct(weights, Profile(width, steps))
  found = run(jnp.float32(weights))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "p, q",
  [
    (Profile(0.05, 100), Profile(0.10, 100)),
    (Profile(0.05, 40), Profile(0.10, 100)),
    (Profile(0.05, 100), Profile(0.10, 40)),
    (Profile(0.25, 7), Profile(0.03, 900)),
    (Profile(0.10, 50), Profile(0.10, 50)),
  ],
)
def test_inner_products_are_the_integrals(p, q):
  end = min(p.step, q.step)
  expected, _ = integrate.quad(
    lambda tau: profile(tau, p) * profile(tau, q), 0, end, epsrel=1e-10
  )
  np.testing.assert_allclose(posthoc.inner_product(p, q), expected, rtol=1e-8)
  assert posthoc.inner_product(p, q) == posthoc.inner_product(q, p)


def stored_profiles(num: int, every: int) -> list[Profile]:
  return [
    Profile(width, every * i) for i in range(1, num + 1) for width in WIDTHS
  ]


def test_error_is_orthogonal_to_what_is_stored():
  """What makes it the least squares solution."""
  stored, wanted = stored_profiles(6, 50), Profile(0.15, 300)
  x = posthoc.combine(stored, wanted)
  for p in stored:
    rest = sum(w * posthoc.inner_product(q, p) for w, q in zip(x, stored))
    rest -= posthoc.inner_product(wanted, p)
    assert abs(rest) < 1e-10 * posthoc.inner_product(p, p)


@pytest.mark.parametrize("width", [0.03, 0.08, 0.15])
def test_more_snapshots_come_closer(width):
  """The profile's error and the average's own, against the average itself."""
  steps = 3840
  weights = trajectory(steps)
  wanted = Profile(width, steps)
  truth = direct(weights, wanted)
  errors, profile_errors = [], []
  for num in (4, 16, 64):
    stored = stored_profiles(num, steps // num)
    x = posthoc.combine(stored, wanted)
    found = x @ np.stack([direct(weights, p) for p in stored])
    errors.append(np.abs(found - truth).max())
    profile_errors.append(posthoc.relative_error(stored, wanted, x))
  assert errors == sorted(errors)[::-1]
  assert profile_errors == sorted(profile_errors)[::-1]
  # Values of order 1. With 64 snapshots; 0.03 is narrower than all stored.
  assert errors[-1] < {0.03: 2e-2, 0.08: 1e-3, 0.15: 1e-3}[width]
  assert np.abs(x).sum() < 20  # rounding of stored values is not blown up


def test_stored_widths_come_back_exactly():
  stored = stored_profiles(5, 10)
  for wanted in (Profile(0.05, 50), Profile(0.10, 50)):
    x = posthoc.combine(stored, wanted)
    assert x.tolist() == [float(p == wanted) for p in stored]
    # Without the short cut: the same up to the conditioning of (1).
    near = Profile(wanted.sigma_rel * (1 + 1e-12), 50)
    np.testing.assert_allclose(posthoc.combine(stored, near), x, atol=1e-8)


def test_two_averages_of_one_width_share_the_weight():
  stored = [Profile(0.05, 10), Profile(0.05, 10), Profile(0.10, 10)]
  single = posthoc.combine(stored[1:], Profile(0.08, 10))
  x = posthoc.combine(stored, Profile(0.08, 10))
  np.testing.assert_allclose([x[0] + x[1], x[2]], single, rtol=1e-9)


# From here on with files.


def config_of(steps: int, every: int):
  config = digits.get_config("debug,ema=power")
  config.total_steps, config.snapshot_every_steps = steps, every
  return config


def as_tree(row, mesh=None):
  tree = {"a": {"kernel": np.float32(row[:16]).reshape(2, 8)}}
  tree["b"] = np.float32(row[16:])
  if mesh is None:
    return tree
  return jax.device_put(tree, sharding.tree_sharding(mesh, tree))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Workdir with 8 snapshots of a made-up run of 64 steps; its weights."""
  folder = tmp_path_factory.mktemp("snapshots")
  mesh = make_mesh(1, 8)
  weights = trajectory(64)
  config = config_of(64, 8)
  writer = snapshots.Snapshots(folder, config)
  for step in range(65):
    averages = {"edm": as_tree(np.zeros(20), mesh)}
    if step and step % 8 == 0:
      for name, width in ema.power_averages(config.ema).items():
        row = direct(weights, Profile(width, step))
        averages[name] = as_tree(row, mesh)
      writer.save(step, averages)
  writer.close()
  return folder, weights


def abstract_on(mesh):
  tree = as_tree(np.zeros(20))
  return sharding.with_sharding(tree, sharding.tree_sharding(mesh, tree))


@pytest.mark.parametrize("devices", [slow(1), 8])
def test_reconstruction_from_files(run, devices):
  folder, weights = run
  mesh = make_mesh(1, devices, devices=jax.devices()[:devices])
  made = snapshots.reconstruct(folder, 0.08, abstract_on(mesh))
  assert made.step == 64 and "sigma_rel 0.08 at step 64" in made.about
  wanted = Profile(0.08, 64)
  stored = stored_profiles(8, 8)
  x = posthoc.combine(stored, wanted)
  expected = as_tree(x @ np.stack([direct(weights, p) for p in stored]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6),  # float32 sums
    made.params,
    expected,
  )
  kernel = made.params["a"]["kernel"].sharding
  assert kernel.spec == abstract_on(mesh)["a"]["kernel"].sharding.spec
  truth = as_tree(direct(weights, wanted))
  error = np.abs(made.params["b"] - truth["b"]).max()
  assert error < 0.05  # of values of order 1, with but 8 snapshots


def test_a_stored_width_and_step_is_read_to_the_bit(run):
  folder, weights = run
  abstract = abstract_on(make_mesh(1, 1, devices=jax.devices()[:1]))
  for step in (None, 24):
    made = snapshots.reconstruct(folder, 0.10, abstract, step)
    expected = as_tree(direct(weights, Profile(0.10, step or 64)))
    jax.tree.map(np.testing.assert_array_equal, made.params, expected)


def test_too_few_snapshots_are_warned_of(run, caplog):
  abstract = abstract_on(make_mesh(1, 1, devices=jax.devices()[:1]))
  snapshots.reconstruct(run[0], 0.25, abstract)
  assert "too few for sigma_rel 0.25" in caplog.text


def test_a_step_that_is_there_is_left_alone(run):
  folder, _ = run
  writer = snapshots.Snapshots(folder, config_of(64, 8))
  before = sorted((folder / "snapshots").iterdir())
  tree = as_tree(np.ones(20), make_mesh(1, 8))
  writer.save(64, {"p05": tree, "p10": tree})
  writer.close()
  assert sorted((folder / "snapshots").iterdir()) == before
  test_a_stored_width_and_step_is_read_to_the_bit(run)


def test_snapshots_of_another_run_are_refused(run):
  config = config_of(64, 8)
  config.seed = 1
  with pytest.raises(UserError, match="holds snapshots of another run"):
    snapshots.Snapshots(run[0], config)


def test_without_snapshots_one_sentence_says_what_to_do(tmp_path):
  abstract = abstract_on(make_mesh(1, 1, devices=jax.devices()[:1]))
  with pytest.raises(UserError, match="no snapshots.*snapshot_every_steps"):
    snapshots.reconstruct(tmp_path, 0.08, abstract)
  with pytest.raises(UserError, match="sigma_rel=0.5 must be above 0"):
    snapshots.reconstruct(tmp_path, 0.5, abstract)


def test_a_damaged_snapshot_is_named(run, tmp_path):
  import shutil

  folder = shutil.copytree(run[0], tmp_path / "run")
  shutil.rmtree(folder / "snapshots" / "16" / "ema")
  abstract = abstract_on(make_mesh(1, 1, devices=jax.devices()[:1]))
  with pytest.raises(UserError, match="snapshot 16 cannot be read.*delete"):
    snapshots.reconstruct(folder, 0.08, abstract)
  shutil.rmtree(folder / "snapshots" / "16")
  made = snapshots.reconstruct(folder, 0.08, abstract)
  assert "from 14 stored averages" in made.about
  assert storage.list_steps(storage.absolute(folder) / "snapshots")[-1] == 64


def test_configs_that_cannot_keep_snapshots_are_refused():
  config = digits.get_config("debug")
  config.snapshot_every_steps = 5
  with pytest.raises(UserError, match=r"snapshot_every_steps=5 .*\['edm'\]"):
    checks.check_consistent(config)
  config = config_of(4, 0)
  checks.check_consistent(config)  # averages without snapshots are fine
  config.ema.p05.sigma_rel = 0.4
  with pytest.raises(UserError, match="sigma_rel=0.4 must be above 0"):
    checks.check_consistent(config)
