"""Training on the digits: resume to the bit, devices, stops, bad numbers."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from comparison import assert_same_network
from configs import digits
from diffit_jax import claim
from diffit_jax.data import pipeline
from diffit_jax.errors import UserError
from diffit_jax.generation.generator import make_grid_sampler
from diffit_jax.parallel import sharding
from diffit_jax.run import checkpoint, state
from diffit_jax.stop import Stopped
from diffit_jax.training import actions, loop, source
from diffit_jax.training import program as program_lib
from slow import slow

PID = os.getpid()


def small(**fields):
  """The digits' debug config, some top-level fields changed."""
  config = digits.get_config("debug")
  config.update(fields)
  return config


def one_device():
  return jax.devices()[:1]


def final_state(config, workdir, devices=None):
  """What the newest checkpoint holds."""
  program = program_lib.build(config, devices or one_device())
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return checkpoints.restore(program.abstract)
  finally:
    checkpoints.close()


def assert_equal_states(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory):
  """Workdir of an undisturbed run of 4 steps, saved at 2 and 4."""
  workdir = tmp_path_factory.mktemp("reference")
  loop.train(small(), workdir, data_dir, devices=one_device())
  return workdir


@pytest.fixture()
def copy(reference, tmp_path):
  """A copy of the reference run, to be damaged."""
  return pathlib.Path(shutil.copytree(reference, tmp_path / "run"))


def test_two_and_two_steps_equal_four(reference, data_dir, tmp_path):
  for total in (2, 4):
    config = small(total_steps=total)
    loop.train(config, tmp_path, data_dir, devices=one_device())
  assert_equal_states(
    final_state(small(), tmp_path), final_state(small(), reference)
  )


def test_checkpoint_holds_everything(reference):
  step = reference / "checkpoints" / "4"
  progress = json.loads((step / "progress" / "metadata").read_text())
  assert progress == {"step": 4, "data_position": 64}
  assert checkpoint.list_steps(reference) == [2, 4]
  restored = final_state(small(), reference)
  assert int(restored.step) == 4
  dtypes = {
    leaf.dtype for leaf in jax.tree.leaves((restored.params, restored.ema))
  }
  assert dtypes == {jnp.dtype("float32")}


def test_a_finished_run_is_left_alone(copy, data_dir):
  before = sorted(p.name for p in (copy / "checkpoints").iterdir())
  loop.train(small(), copy, data_dir, devices=one_device())
  assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == before


def test_stop_request_saves_and_the_run_goes_on_to_the_same_bits(
  reference, data_dir, tmp_path
):
  """SIGTERM in the middle of step 3, which no interval would have saved."""
  import os
  import signal


  def make_batches(*args):
    for number, batch in enumerate(source.make_batches(*args), 1):
      if number == 4:  # one batch is put ahead of the step
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with pytest.raises(Stopped):
    loop.train(
      small(),
      tmp_path,
      data_dir,
      devices=one_device(),
      make_batches=make_batches,
    )
  assert checkpoint.list_steps(tmp_path) == [2, 3]
  loop.train(small(), tmp_path, data_dir, devices=one_device())
  assert_equal_states(
    final_state(small(), tmp_path), final_state(small(), reference)
  )


@pytest.mark.parametrize("damage", ["truncate", slow("delete"), slow("item")])
def test_damaged_newest_checkpoint_falls_back(
  damage, copy, reference, data_dir, caplog
):
  newest = copy / "checkpoints" / "4"
  files = [p for p in (newest / "params").rglob("*") if p.is_file()]
  if damage == "truncate":
    for path in files:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif damage == "delete":
    for path in files:
      path.unlink()
  else:
    shutil.rmtree(newest / "params")
  loop.train(small(), copy, data_dir, devices=one_device())
  assert "checkpoint 4 cannot be read" in caplog.text
  assert (copy / "damaged" / "4").is_dir()
  assert_equal_states(
    final_state(small(), copy), final_state(small(), reference)
  )


def test_all_checkpoints_damaged_is_an_error_that_changes_nothing(
  copy, data_dir
):
  for path in (copy / "checkpoints").glob("*/params"):
    shutil.rmtree(path)
  before = sorted(p for p in copy.rglob("*") if p.is_file())
  with pytest.raises(UserError, match=r"none of the checkpoints .*\[4, 2\]"):
    loop.train(small(), copy, data_dir, devices=one_device())
  assert sorted(p for p in copy.rglob("*") if p.is_file()) == before


def test_another_run_in_the_workdir_is_refused(copy, data_dir):
  config = small(seed=1, batch_size=32)
  config.model.dropout = 0.5
  before = (copy / "config.json").read_text()
  with pytest.raises(UserError) as error:
    loop.train(config, copy, data_dir, devices=one_device())
  for text in (
    "seed is 0 there and 1 here",
    "batch_size is 16 there and 32 here",
    "model.dropout is 0.0 there and 0.5 here",
  ):
    assert text in str(error.value)
  assert (copy / "config.json").read_text() == before


@pytest.mark.parametrize(
  "here, workdir, found",
  [("x", "runs/lr[1e-4]", r"\["), ("a*b", "run", r"\*"), ("x", "a?", r"\?")],
)
def test_a_pattern_in_the_path_is_refused_before_anything_is_made(
  here, workdir, found, data_dir, tmp_path, monkeypatch
):
  """Orbax globs the absolute path, so the current folder counts as well."""
  (tmp_path / here).mkdir()
  monkeypatch.chdir(tmp_path / here)
  with pytest.raises(UserError, match=rf"^cannot train in /.*: {found} is"):
    loop.train(small(), workdir, data_dir, devices=one_device())
  assert [*tmp_path.rglob("*")] == [tmp_path / here]


def test_a_workdir_in_use_is_refused(data_dir, tmp_path):
  """Whatever the other run's config; the file's owner is this process."""
  place = tmp_path / ".training.claim"
  with (
    claim.exclusive(place, "--workdir", tmp_path),
    pytest.raises(UserError, match=f"--workdir=.* is in use by process {PID}"),
  ):
    loop.train(small(seed=3), tmp_path, data_dir, devices=one_device())
  assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_workdir_stops_before_it_writes(data_dir, tmp_path):
  place = tmp_path / ".training.claim"

  def take_over(averages):
    place.write_text(place.read_text().replace('"pid"', '"former"'))
    return np.zeros((1, 8, 8, 1), np.uint8)

  with pytest.raises(UserError, match="was taken over by another process"):
    loop.train(
      small(total_steps=6, sample_every_steps=3),
      tmp_path,
      data_dir,
      make_sampler=lambda *_: take_over,
      devices=one_device(),
    )
  assert checkpoint.list_steps(tmp_path) == [2]
  assert place.exists()


def test_other_data_of_the_same_name_are_refused(copy, data_dir, tmp_path):
  other = tmp_path / "data"
  shutil.copytree(data_dir, other)
  file = other / "digits" / "1.0.0" / "prepared.json"
  metadata = json.loads(file.read_text())
  file.write_text(json.dumps(metadata | {"content_hash": "0"}))
  with pytest.raises(UserError, match="data_identity.content_hash is"):
    loop.train(small(total_steps=5), copy, str(other), devices=one_device())


def test_a_sharded_run_draws_grids_and_traces_its_step_once(
  data_dir, tmp_path, monkeypatch
):
  programs = []
  real = program_lib.build

  def build(*args):
    programs.append(real(*args))
    return programs[-1]

  monkeypatch.setattr(program_lib, "build", build)
  config = small(sample_every_steps=2)
  config.mesh.fsdp = 2
  two = jax.devices()[:2]
  loop.train(config, tmp_path, data_dir, make_grid_sampler, devices=two)
  assert programs[0].train_step._cache_size() == 1
  grid, _ = sorted((tmp_path / "samples").iterdir())
  assert grid.name == "samples_edm_00000002.png" and grid.stat().st_size > 200


def test_a_grid_lost_after_its_step_was_saved_is_made_up_for(copy, data_dir):
  """As where a kill came between the two: the copied run has drawn none."""
  drawn = []

  def sampler(average):
    drawn.append(jax.device_get(average))
    return np.full((1, 8, 8, 1), 7, np.uint8)

  for _ in range(2):
    loop.train(
      small(),
      copy,
      data_dir,
      make_sampler=lambda *_: sampler,
      devices=one_device(),
    )
  (average,) = drawn
  assert_equal_states(average, final_state(small(), copy).ema["edm"])
  (grid,) = (copy / "samples").iterdir()
  assert grid.name == "samples_edm_00000004.png"


def test_damaged_data_end_in_one_sentence(data_dir, tmp_path):
  other = tmp_path / "data"
  shutil.copytree(data_dir, other)
  (file,) = (other / "digits" / "1.0.0").glob("*.array_record*")
  content = bytearray(file.read_bytes())
  content[len(content) // 4 : len(content) // 2] = bytes(
    len(content) // 2 - len(content) // 4
  )
  file.write_bytes(content)
  with pytest.raises(UserError, match="digits/1.0.0 is damaged"):
    loop.train(small(), tmp_path / "run", str(other), devices=one_device())


@pytest.mark.slow
def test_a_folder_without_a_checkpoint_is_free_for_another_run(
  data_dir, tmp_path
):
  (tmp_path / "config.json").write_text('{"seed": 99}')
  config = small(total_steps=1)
  loop.train(config, tmp_path, data_dir, devices=one_device())


@pytest.mark.slow
def test_logging_intervals_and_total_steps_may_change(copy, data_dir):
  config = small(total_steps=5, log_every_steps=1, save_every_steps=3)
  config.sampler.steps = 2
  loop.train(config, copy, data_dir, devices=one_device())
  assert 5 in checkpoint.list_steps(copy)


def steps_on(devices, config, data_dir, count=4):
  """(loss of each step, state after them) on the given devices."""
  program = program_lib.build(config, devices)
  now = state.create(program.init, program.mesh)
  dataset = pipeline.open_dataset("digits", data_dir)
  losses = []
  options = {"global_batch_size": config.batch_size, "seed": config.seed}
  with pipeline.Pipeline(dataset, **options) as batches:
    for _ in range(count):
      monitor = state.new_monitor(program.mesh)
      batch = sharding.put_batch(program.mesh, next(batches))
      now, monitor = program.train_step(now, monitor, batch)
      losses.append(float(monitor.loss))
  return losses, jax.device_get(now)


@pytest.mark.slow  # test_placement.py has one step, with its gradient
def test_eight_devices_equal_one(data_dir):
  """Equal up to the order of sums over the batch; dropout is on."""
  config = digits.get_config("debug")
  config.model.dropout = 0.2
  losses_8, eight = steps_on(jax.devices(), config, data_dir)
  losses_1, one = steps_on(one_device(), config, data_dir)
  np.testing.assert_allclose(losses_8, losses_1, rtol=1e-5)
  program = program_lib.build(config, one_device())
  assert_same_network(program.model, eight.params, one.params)


def test_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(
  data_dir, tmp_path
):
  config = small(total_steps=2)
  # Above exp(44) the square of a noise level is infinite: 1 in 60 of these.
  config.diffusion.P_mean, config.diffusion.P_std = 4.0, 19.0
  config.save_every_steps = 1
  config.total_steps = 50
  config.log_every_steps = 50
  with pytest.raises(UserError, match="not finite .*step .*: nothing") as error:
    loop.train(config, tmp_path, data_dir, devices=one_device())
  last = checkpoint.list_steps(tmp_path)[-1]
  assert 1 <= last < 49
  assert f"step {last + 1}: nothing was saved since" in str(error.value)
  restored = final_state(config, tmp_path)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored))


def test_bad_step_is_the_first_one():
  """The latch keeps the first step, whatever comes later."""
  from diffit_jax.training import step

  monitor = state.Monitor(*map(jnp.asarray, (0.0, 0.0, 0, -1)))
  for number, loss in enumerate([1.0, np.nan, 2.0, np.inf]):
    monitor = step._watch(
      monitor, number, jnp.float32(loss), {"w": jnp.ones(2)}
    )
  assert int(monitor.bad_step) == 1 and int(monitor.steps) == 4


class Untouchable:
  """A leaf that notes when anything looks at its value."""

  touched = []
  now = 0
  shape, dtype, size = (), np.dtype("float32"), 1

  def _touch(self, *_, **__):
    Untouchable.touched.append(Untouchable.now)
    return np.float32(-1)

  def __int__(self):
    return int(self._touch())

  __array__ = __float__ = __bool__ = __index__ = _touch
  block_until_ready = copy_to_host_async = _touch


def test_no_value_is_fetched_between_logging_points(
  data_dir, tmp_path, monkeypatch
):
  """The step is replaced by one that returns leaves which note every look."""
  Untouchable.touched.clear()
  leaf = Untouchable()
  monitor = state.Monitor(leaf, leaf, leaf, leaf)
  tree = {"w": leaf}
  fake_state = state.TrainState(leaf, tree, tree, {"edm": tree})

  def fake_step(old, _, batch):
    Untouchable.now = len(seen) + 1
    seen.append(batch["index"])
    return fake_state, monitor

  seen = []
  real = program_lib.build
  monkeypatch.setattr(
    program_lib,
    "build",
    lambda *args: program_lib.dataclasses.replace(
      real(*args), train_step=fake_step
    ),
  )
  figures = lambda now: {"param_norm": leaf._touch(), "learning_rate": 0}
  monkeypatch.setattr(actions, "_make_figures", lambda config: figures)
  monkeypatch.setattr(
    checkpoint.Checkpoints, "save", lambda self, step, now, *_: leaf._touch()
  )
  for name in ("block_until_ready", "device_get"):
    real_wait = getattr(jax, name)
    watched = lambda tree, wait=real_wait: (leaf._touch(), wait(tree))[1]
    monkeypatch.setattr(jax, name, watched)
  config = small(
    total_steps=12,
    log_every_steps=5,
    save_every_steps=6,
    sample_every_steps=0,
  )
  loop.train(config, tmp_path, data_dir, devices=one_device())
  assert len(seen) == 12
  assert set(Untouchable.touched) - {0} == {5, 6, 10, 12}


def test_data_that_do_not_fit_the_config_are_refused(data_dir, tmp_path):
  config = small()
  config.data.resolution = 16
  with pytest.raises(UserError, match="16x16.*8x8"):
    loop.train(config, tmp_path / "run", data_dir, devices=one_device())
  config = small()
  config.data.name = "ffhq64"
  with pytest.raises(UserError, match="python -m diffit_jax.prepare ffhq64"):
    loop.train(config, tmp_path / "run", data_dir, devices=one_device())
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(batch_size=12), "batch_size=12 cannot be divided over 8 devices"),
    (dict(total_steps=0), "total_steps=0 must be at least 1"),
    (dict(keep_checkpoints=0), "keep_checkpoints=0 must be at least 1"),
    (dict(seed=-1), "seed=-1 must be at least 0"),
    (dict(matmul_precision="foo"), "matmul_precision='foo': use one of"),
    ({"model.dropout": 1.5}, "model.dropout=1.5 must be at least 0"),
    ({"model.dtype": "foo"}, "model.dtype='foo': use one of"),
    ({"model.head_dim": 0}, "model.head_dim=0 .* at least 1"),
    ({"diffusion.label_drop_prob": 2.0}, "label_drop_prob=2.0 must be"),
    ({"diffusion.augment_prob": 2.0}, "augment"),
    ({"sampler.num_grid": 0}, "sampler.num_grid=0 must be at least 1"),
    ({"ema.edm.kind": "foo"}, "ema.edm.kind='foo': use one of"),
    (
      dict(keep_every_steps=3, save_every_steps=2),
      "keep_every_steps=3 must be a multiple of save_every_steps=2",
    ),
    ({"mesh.data": 3}, r"mesh.data=3 x mesh.fsdp=1 does not make 8"),
    ({"model.augment_dim": 9}, "model.augment_dim=9 must be 0"),
    ({"model.num_classes": 7}, "model.num_classes=7 must be 0 or"),
    ({"diffusion.kind": "vp"}, "diffusion.kind='vp'"),
    ({"model.window_size": 3}, "window_size=3 does not divide"),
  ],
  ids=str,
)
def test_configs_that_cannot_work_are_refused(change, message):
  config = small()
  config.update_from_flattened_dict(change)
  with pytest.raises(UserError, match=message):
    program_lib.build(config)
