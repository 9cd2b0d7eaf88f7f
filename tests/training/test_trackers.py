"""Metrics to more than TensorBoard; the real libraries are in slow tests."""

import importlib.util
import json
import logging
import pathlib
import struct

from ml_collections import config_dict
import numpy as np
import pytest

import commands
from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.run import identity
from diffit_jax.training import log, trackers
import tensorboard_files

IMAGES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)


class Fake:
  """A tracker that remembers its calls, and may fail at one of them."""

  def __init__(self, fails_at: str = ""):
    self.calls, self._fails_at = [], fails_at

  def __getattr__(self, method):
    def call(*args):
      self.calls.append((method, *args))
      if method == self._fails_at:
        raise RuntimeError("503: try later\n<html>")

    return call


@pytest.fixture
def rows(monkeypatch):
  """Adds a row to the table; returns the function that does."""

  def add(name, open_tracker, package="json"):
    row = trackers.Row(open_tracker, package)
    monkeypatch.setitem(trackers.TRACKERS, name, row)

  return add


def config_of(*names) -> config_dict.ConfigDict:
  config = digits.get_config("debug")
  config.trackers = names
  return config


def write_all(writer: log.Writer) -> None:
  writer.text("parameters.txt", "many")
  writer.scalars(2, {"loss": 0.5})
  writer.images(4, "samples_edm", IMAGES)
  writer.flush()
  writer.close()


def written(folder: pathlib.Path) -> set[str]:
  return {tag for tag, _ in tensorboard_files.read(folder / "tensorboard")}


def test_every_tracker_gets_everything(rows, tmp_path):
  fake = Fake()
  rows("fake", lambda directory, config: fake)
  write_all(log.Writer(tmp_path, config_of("tensorboard", "fake")))
  text, scalars, (_, step, name, grid), *rest = fake.calls
  assert text == ("text", "parameters.txt", "many")
  assert scalars == ("scalars", 2, {"loss": 0.5})
  assert (step, name, grid.dtype, grid.ndim) == (4, "samples_edm", "uint8", 3)
  assert [call[0] for call in rest] == ["flush", "flush", "close"]
  assert written(tmp_path) == {"loss", "samples_edm"}


@pytest.mark.parametrize(
  "method", ["open", "scalars", "images", "text", "flush", "close"]
)
def test_one_that_fails_is_warned_of_once_and_left_alone(
  rows, tmp_path, caplog, method
):
  fake = Fake(method)

  def open_tracker(directory, config):
    fake.calls.append(("open",))
    if method == "open":
      raise RuntimeError("503: try later\n<html>")
    return fake

  rows("fake", open_tracker)
  with caplog.at_level(logging.WARNING):
    write_all(log.Writer(tmp_path, config_of("fake", "tensorboard")))
  (record,) = caplog.records
  assert record.getMessage() == (
    "the tracker fake failed and is left alone until the next start; training"
    " goes on: 503: try later"
  )
  assert fake.calls[-1][0] == method  # nothing came after
  assert written(tmp_path) == {"loss", "samples_edm"}


def test_what_stops_the_workdirs_own_files_stops_the_run(monkeypatch, tmp_path):
  writer = log.Writer(tmp_path, config_of("tensorboard"))

  def refuse(*args):
    raise OSError("no space left")

  monkeypatch.setattr(trackers.events.EventWriter, "scalars", refuse)
  with pytest.raises(UserError, match="cannot write to the workdir"):
    writer.scalars(2, {"loss": 0.5})


def test_one_is_opened_when_something_is_written(rows, tmp_path):
  rows("fake", lambda directory, config: pytest.fail("opened"))
  writer = log.Writer(tmp_path, config_of("fake"))
  writer.flush()
  writer.close()


def test_other_processes_open_none(rows, monkeypatch, tmp_path):
  rows("fake", lambda directory, config: pytest.fail("opened"))
  monkeypatch.setattr(log.jax, "process_index", lambda: 1)
  write_all(log.Writer(tmp_path, config_of("fake", "tensorboard")))
  assert not [*tmp_path.iterdir()]


def test_a_config_of_before_has_tensorboard(tmp_path):
  config = digits.get_config("debug")
  assert config.trackers == trackers.DEFAULT == ("tensorboard",)
  del config.trackers
  write_all(log.Writer(tmp_path, config))
  assert written(tmp_path) == {"loss", "samples_edm"}
  old = identity.resolve(config, None)
  new = identity.resolve(config_of("tensorboard", "wandb"), None)
  assert identity.differences(old, new) == []  # and its run goes on


def test_no_trackers_leave_the_grids_and_texts(tmp_path):
  write_all(log.Writer(tmp_path, config_of()))
  assert {path.name for path in tmp_path.iterdir()} == {
    *("parameters.txt", "samples")
  }


def test_an_unknown_one_is_refused_with_those_there_are():
  with pytest.raises(UserError, match="there is no 'tensorbord', only tensorb"):
    trackers.check(config_of("tensorbord"))
  with pytest.raises(
    UserError, match=r"no 'tensorboard,wandb', only .* two ar"
  ):
    trackers.check(config_of("tensorboard,wandb"))


def test_one_that_is_not_installed_ends_the_run_before_it_starts(
  monkeypatch, tmp_path
):
  from diffit_jax.training import loop

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"wandb: pip install 'diffit_jax\[wandb"):
    loop.train(config_of("tensorboard", "wandb"), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_name_with_trackers(tmp_path):
  make = lambda folder: trackers._run_id(log.workdir.path_of(tmp_path / folder))
  assert make("a") == make("a") != make("b")


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(data_dir, tmp_path):
  """The real library; nothing leaves the machine."""
  pytest.importorskip("wandb")
  word = (
    f"main --config=configs/digits.py:debug --data_dir={data_dir}"
    f" --workdir={tmp_path} --config.trackers=('tensorboard','wandb')"
  )
  env = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
  for total in (2, 4, 4):  # the last finds nothing to do
    commands.succeed(f"{word} --config.total_steps={total}", **env)
  name = (tmp_path / "tracker_id.txt").read_text()
  runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert len(runs) == 2 and all(run.name.endswith(f"-{name}") for run in runs)
  found = [wandb_history(run / f"run-{name}.wandb") for run in runs]
  assert [[row["step"] for row in rows] for rows in found] == [[2, 2], [4, 4]]
  losses = dict(tensorboard_files.read(tmp_path / "tensorboard"))[
    "loss", "scalars"
  ]
  assert [
    (row["step"], pytest.approx(row["loss"]))
    for rows in found
    for row in rows
    if "loss" in row
  ] == losses
  assert found[1][-1]["samples_edm._type"] == "image-file"


def wandb_history(path: pathlib.Path) -> list[dict]:
  """The rows that were logged to a file of W&B's."""
  from wandb.proto import wandb_internal_pb2

  rows = []
  for content in records(path.read_bytes()):
    record = wandb_internal_pb2.Record.FromString(content)
    if record.WhichOneof("record_type") == "history":
      items = record.history.item
      key = lambda item: item.key or ".".join(item.nested_key)
      rows.append({key(item): json.loads(item.value_json) for item in items})
  return rows


def records(log_file: bytes):
  """Records of LevelDB's log format, after W&B's header of 7 bytes."""
  at, parts, block, last = 7, [], 32768, (1, 4)
  while at < len(log_file):
    if block - at % block < 7:  # no room for a header: padding
      at += block - at % block
      continue
    _, length, kind = struct.unpack_from("<IHB", log_file, at)
    parts.append(log_file[at + 7 : at + 7 + length])
    at += 7 + length
    if kind in last:
      yield b"".join(parts)
      parts = []


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  trackio = pytest.importorskip("trackio")
  for step in (2, 4):
    writer = log.Writer(tmp_path / "run", config_of("trackio"))
    writer.scalars(step, {"loss": step / 4})
    writer.images(step, "samples_edm", IMAGES)
    writer.close()
  (run,) = trackio.Api().runs("diffit_jax")
  name = (tmp_path / "run/tracker_id.txt").read_text()
  assert run.name == f"digits-debug-{name}"
