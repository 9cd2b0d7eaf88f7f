"""Checkpoints: any mesh, any damage, what stays, and failures of saving."""

import gc
import json
import pathlib
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import commands
from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.interop import native
from diffit_jax.parallel import sharding
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.run import checkpoint, storage
from diffit_jax.run.state import TrainState, replace_params
from diffit_jax.training import checks, loop, program
from slow import slow
import two_processes

# Orbax drops its other reads when one of them fails, which warn as they go.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


def state_at(step: int, mesh) -> TrainState:
  """A small state whose every array depends on the step."""
  rng = np.random.default_rng(step)
  params = lambda: {
    "a": {"kernel": rng.normal(size=(16, 24)).astype(np.float32)},
    "b": {"bias": rng.normal(size=8).astype(np.float32)},
  }
  tree = TrainState(
    step=np.int32(step),
    params=params(),
    opt_state=(np.int32(step), {"mu": params(), "nu": params()}),
    ema={"edm": params(), "p05": params()},
  )
  return jax.device_put(tree, sharding.tree_sharding(mesh, tree))


def abstract_on(mesh) -> TrainState:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state_at(0, mesh),
  )


def one_device():
  return make_mesh(1, 1, devices=jax.devices()[:1])


def save(workdir, steps, mesh=None, metrics=None, **options) -> None:
  """One start of a run that saves some steps."""
  checkpoints = checkpoint.Checkpoints(workdir, **options)
  for step in steps:
    values = None if metrics is None else metrics[step]
    checkpoints.save(step, state_at(step, mesh or one_device()), 16, values)
  checkpoints.close()


def restore(workdir, mesh=None) -> TrainState:
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return checkpoints.restore(abstract_on(mesh or one_device()))
  finally:
    checkpoints.close()


def assert_is_state(found: TrainState, step: int) -> None:
  expected = state_at(step, one_device())
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with the checkpoints 1 and 2."""
  folder = tmp_path_factory.mktemp("saved")
  save(folder, [1, 2])
  return folder


@pytest.fixture()
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("data, fsdp", [slow(1, 1), (1, 8), slow(8, 1), (2, 2)])
def test_any_mesh_reads_what_any_mesh_saved(data, fsdp, saved, tmp_path):
  mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
  found = restore(saved, mesh)
  assert_is_state(found, 2)
  for leaf, like in zip(*map(jax.tree.leaves, (found, abstract_on(mesh)))):
    assert leaf.sharding == like.sharding
  save(tmp_path, [3], mesh)
  assert_is_state(restore(tmp_path), 3)
  sums = lambda path: json.loads((path / "checksums/metadata").read_text())
  save(tmp_path / "one", [3])
  assert sums(tmp_path / "checkpoints/3") == sums(
    tmp_path / "one/checkpoints/3"
  )


def test_a_run_begun_from_weights_in_half_precision_restores(tmp_path):
  file, mesh = tmp_path / "half.safetensors", one_device()
  header = {"config": "{}", "step": "0", "ema": "edm"}
  half = jax.tree.map(
    lambda x: np.asarray(x, jnp.bfloat16), state_at(5, mesh).params
  )
  native.save(file, half, header)
  begun = replace_params(state_at(0, mesh), native.load(file)[0])
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, begun, 16, None)
  checkpoints.close()
  found = restore(tmp_path)
  for tree in (found.params, *found.ema.values()):
    jax.tree.map(np.testing.assert_array_equal, tree, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("f4")}


@pytest.mark.slow  # test_two_processes.py reads on 8, 2 and 1 devices
def test_a_run_goes_on_on_other_devices_up_to_rounding(data_dir, tmp_path):
  config = digits.get_config("debug")
  config.sample_every_steps = 0

  def train(folder, total, devices, fsdp=1):
    config.total_steps, config.mesh.fsdp = total, fsdp
    loop.train(
      config, tmp_path / folder, data_dir, devices=jax.devices()[:devices]
    )

  train("one", 4, 1)
  train("moved", 2, 2, fsdp=2)
  train("moved", 4, 1)
  parts = program.build(config, jax.devices()[:1])
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  outputs = []
  for folder in ("one", "moved"):
    checkpoints = checkpoint.Checkpoints(tmp_path / folder)
    params = checkpoints.restore(parts.abstract).params
    checkpoints.close()
    outputs.append(parts.model.apply({"params": params}, x, jnp.zeros(4)))
  # As between 8 devices and 1 in test_loop: the order of sums over the batch.
  np.testing.assert_allclose(*outputs, atol=1e-5)


def flip(path: pathlib.Path, position: float) -> None:
  """Flips the bits of one byte, at a share of the file's length."""
  content = bytearray(path.read_bytes())
  content[int(position * (len(content) - 1))] ^= 0xFF
  path.write_bytes(content)


@pytest.mark.slow
def test_no_flipped_byte_goes_unseen(copy, caplog):
  """One byte of each file: the state is 2 to the bit, or 1 and a warning.

  In half of the files near the start, in half of them behind the middle.
  """
  newest, kept = copy / "checkpoints" / "2", copy / "kept"
  shutil.copytree(newest, kept)
  files = [p.relative_to(kept) for p in kept.rglob("*") if p.is_file()]
  files = sorted(p for p in files if (kept / p).stat().st_size)
  assert len(files) > 20
  fallbacks = 0
  for number, file in enumerate(files):
    caplog.clear()
    flip(newest / file, (0.3, 0.6)[number % 2])
    found = restore(copy)
    fell_back = "checkpoint 2 cannot be read" in caplog.text
    assert_is_state(found, 1 if fell_back else 2)
    assert (copy / "damaged" / "2").exists() == fell_back
    fallbacks += fell_back
    shutil.rmtree(copy / "damaged", ignore_errors=True)
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(kept, newest)
  assert fallbacks > 10
  gc.collect()  # the reads that Orbax drops warn when they go


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  files = [p for p in folder.rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def test_a_byte_that_orbax_reads_silently_is_seen_by_its_leaf(copy, caplog):
  flip(largest_file(copy / "checkpoints/2/params"), 0.5)
  with pytest.raises(AssertionError):  # what Orbax alone would have given
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointHandler().restore(
      (copy / "checkpoints/2/params").absolute(),
      args=ocp.args.StandardRestore(abstract_on(one_device()).params),
    )
    expected = state_at(2, one_device()).params
    jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert_is_state(restore(copy), 1)
  assert "params/a/kernel differ from what was saved (checksum" in caplog.text
  assert "moved the damaged step 2 to" in caplog.text
  assert checkpoint.list_steps(copy) == [1]


@pytest.mark.parametrize("damage", ["empty", "no item", "no checksums", "json"])
def test_what_is_missing_falls_back(damage, copy):
  newest = copy / "checkpoints" / "2"
  if damage == "empty":
    shutil.rmtree(newest)
    newest.mkdir()
  elif damage == "no item":
    shutil.rmtree(newest / "opt_state")
  elif damage == "no checksums":
    shutil.rmtree(newest / "checksums")
  else:
    text = (newest / "progress/metadata").read_text()
    (newest / "progress/metadata").write_text(text.replace("32", "48"))
  assert_is_state(restore(copy), 1)


def test_a_step_under_another_steps_name_falls_back(copy, caplog):
  (copy / "checkpoints" / "2").rename(copy / "checkpoints" / "7")
  assert_is_state(restore(copy), 1)
  assert "folder 7 holds step" in caplog.text


def test_a_save_that_was_cut_off_is_no_checkpoint(copy):
  newest = copy / "checkpoints" / "2"
  newest.rename(newest.with_name("2.orbax-checkpoint-tmp-1"))
  assert checkpoint.list_steps(copy) == [1]
  assert_is_state(restore(copy), 1)
  save(copy, [2])
  assert_is_state(restore(copy), 2)
  assert [p.name for p in newest.parent.glob("*tmp*")] == []


def test_one_average_is_read_and_checked_alone(copy):
  like = abstract_on(one_device()).ema["p05"]
  read = lambda: checkpoint.restore_item(copy, 2, "ema", {"p05": like})
  found, expected = read(), state_at(2, one_device()).ema["p05"]
  jax.tree.map(np.testing.assert_array_equal, found, {"p05": expected})
  sums = copy / "checkpoints/2/checksums/metadata"
  text = json.loads(sums.read_text())
  text["ema/p05/b/bias"] = "0" * 16
  sums.write_text(json.dumps(text))
  with pytest.raises(UserError, match="ema/p05/b/bias differ from what was"):
    read()


LOSSES = {1: 5.0, 2: 3.0, 3: 0.5, 4: float("nan"), 5: 2.0, 6: 2.0, 7: 4.0}
# Newest 2; multiples of 4; least loss but for 3, which has none; 8 and 9 later.
KEPT = {2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [4, 5], 6: [4, 5, 6]}


def test_newest_every_nth_and_best_stay_together(tmp_path):
  """Every start saves one step, so that what stays is known from the files."""
  options = dict(max_to_keep=2, keep_period=4, best_by="loss")
  metrics = {n: {"loss": loss, "other": 0} for n, loss in LOSSES.items()}
  metrics[3] = {"other": 1.0}
  kept = {}
  for step in metrics:
    save(tmp_path, [step], metrics=metrics, **options)
    kept[step] = checkpoint.list_steps(tmp_path)
  assert {step: kept[step] for step in KEPT} == KEPT
  assert kept[7] == [4, 5, 6, 7]
  better = {8: {"loss": 1.0}, 9: {"loss": float("inf")}, 10: {"loss": 9.0}}
  save(tmp_path, better, metrics=better, **options)  # 4, 8; 9, 10; 8 is best
  assert checkpoint.list_steps(tmp_path) == [4, 8, 9, 10]


def test_without_a_best_only_the_newest_stay(tmp_path):
  save(tmp_path, range(1, 6), max_to_keep=2)
  assert checkpoint.list_steps(tmp_path) == [4, 5]


def test_unknown_metrics_are_refused_before_training():
  config = digits.get_config("debug")
  config.keep_best_by = "fid"
  with pytest.raises(UserError, match=r"keep_best_by='fid': use one of \['gr"):
    checks.check_consistent(config)
  config.keep_best_by = "loss"
  checks.check_consistent(config)


@pytest.mark.slow
def test_the_loop_keeps_the_best_by_its_own_loss(data_dir, tmp_path):
  config = digits.get_config("debug")
  config.update(
    dict(keep_best_by="loss", total_steps=6, keep_checkpoints=1)
    | dict(save_every_steps=1, log_every_steps=1, sample_every_steps=0)
  )
  loop.train(config, tmp_path, data_dir, devices=jax.devices()[:1])
  logged = {
    step: json.loads(
      (tmp_path / f"checkpoints/{step}/last_log/metadata").read_text()
    )["loss"]
    for step in checkpoint.list_steps(tmp_path)
  }
  assert 6 in logged and len(logged) == 1 + (min(logged, key=logged.get) != 6)


def test_a_save_under_way_is_finished_by_close(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, state_at(1, one_device()), 16)
  checkpoints.save(1, state_at(7, one_device()), 16)  # is there already
  checkpoints.close()
  assert_is_state(restore(tmp_path), 1)


def test_a_failure_in_the_background_is_raised_by_the_next_check(copy):
  """A limit on file sizes stands for a full disk."""
  checkpoints = checkpoint.Checkpoints(copy)
  large = state_at(3, one_device())
  noise = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
  large = large.replace(params={"a": jnp.asarray(noise)})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    checkpoints.save(3, large, 16)
    deadline = time.monotonic() + 20
    with pytest.raises(UserError, match="saving a checkpoint .* older"):
      while time.monotonic() < deadline:
        checkpoints.check()
        time.sleep(0.01)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert checkpoints.steps() == [1, 2]
  checkpoints.save(4, state_at(4, one_device()), 16)  # room was made
  checkpoints.close()
  assert_is_state(restore(copy), 4)


def test_checking_does_nothing_where_nothing_is_saved(saved, monkeypatch):
  checkpoints = checkpoint.Checkpoints(saved)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._folder, "_manager", None)
    checkpoints.check()
  checkpoints.close()


def test_replicated_sums_are_read_by_every_process():
  """The sums' sharding leaves a whole copy on each device."""
  mesh = make_mesh(2, 4)
  from diffit_jax.run import integrity

  x = jax.device_put(
    np.ones((8, 8), np.float32), NamedSharding(mesh, PartitionSpec("fsdp"))
  )
  out = integrity._compiled(integrity._replicated([x]))([x])
  assert out.is_fully_replicated and len(out.sharding.device_set) == 8


def test_two_processes_fall_back_together(tmp_path):
  """Where the file is damaged, and where one process alone cannot read."""
  port = two_processes.free_port()
  driver = pathlib.Path(__file__).with_name("two_readers.py")
  done = two_processes.run_all(
    [[str(driver), str(tmp_path), str(port), str(i)] for i in range(2)],
    XLA_FLAGS=commands.FAST_COMPILE,
  )
  for returncode, out, err in done:
    assert returncode == 0, err[-3000:]
    assert json.loads(out.splitlines()[-1]) == [1, True, [1]]
  assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
  assert checkpoint.list_steps(tmp_path) == [1, 4]
  assert_is_state(restore(tmp_path), 4)  # on one device of one process


def test_what_may_pass_is_tried_again(monkeypatch):
  monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
  errors = [OSError("stale file handle"), ValueError("UNAVAILABLE: try later")]

  def call():
    if errors:
      raise errors.pop()
    return "read"

  assert storage._persist(call) == "read" and not errors


@pytest.mark.parametrize(
  "error", [FileNotFoundError("no such file"), ValueError("DATA_LOSS")]
)
def test_damage_is_not_tried_again(error, monkeypatch):
  calls = []

  def call():
    calls.append(None)
    raise error

  with pytest.raises(type(error)):
    storage._persist(call)
  assert len(calls) == 1
