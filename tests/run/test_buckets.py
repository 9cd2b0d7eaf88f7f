"""Workdirs in buckets: one file system, which stands in memory here."""

import contextlib
import importlib.util
import io
import pathlib

from etils import epath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
from PIL import Image
import pytest

from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.generation import weights
from diffit_jax.pictures import page
from diffit_jax.run import workdir
from diffit_jax.training import events, log, timing
import tensorboard_files


class Store(MemoryFileSystem):
  """Stands for gcsfs: whoever asks fsspec for `gcs` gets it."""

  protocol = ("gs", "gcs")
  store, pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture
def store(monkeypatch):
  """{path: content} of a store with one empty bucket, `bucket`."""
  fsspec.register_implementation("gcs", Store, clobber=True)
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: name == "gcsfs" or find(name)
  )
  Store.store.clear()
  Store.pseudo_dirs[:] = ["", "/bucket"]
  return lambda: {
    name: file.getvalue() for name, file in sorted(Store.store.items())
  }


def read_events(files: dict[str, bytes], folder: pathlib.Path):
  """What TensorBoard makes of some files, copied into a folder."""
  folder.mkdir()
  for name, content in files.items():
    (folder / name.rpartition("/")[2]).write_bytes(content)
  return tensorboard_files.read(folder)


def test_all_of_a_run_goes_through_the_one_file_system(
  store, monkeypatch, tmp_path
):
  """With TensorFlow installed too, whose file system epath prefers."""
  run = "gs://bucket/runs/one"
  config = digits.get_config("debug")
  workdir.enter(run, config, {"name": "digits"})
  assert weights.read_config(run).batch_size == config.batch_size
  writer = log.Writer(run, config)
  writer.text("parameters.txt", "many")
  writer.scalars(2, {"loss": 0.5, "evaluation/fid": 7})
  writer.flush()
  images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
  writer.images(4, "samples_edm", images)
  writer.close()
  profiler = timing.jax.profiler

  def start_trace(folder, **_):
    local = pathlib.Path(folder) / "plugins" / "profile" / "x"
    local.mkdir(parents=True)
    (local / "host.xplane.pb").write_bytes(b"trace")

  monkeypatch.setattr(profiler, "start_trace", start_trace)
  monkeypatch.setattr(profiler, "stop_trace", lambda: None)
  profile = timing.StepTrace(range(1, 2), run, contextlib.nullcontext)
  profile.before(1)
  profile.close()

  root, files = "/bucket/runs/one/", store()
  in_folder = lambda name: {
    path: content
    for path, content in files.items()
    if path.startswith(f"{root}{name}/")
  }
  assert set(files) == {
    f"{root}config.json",
    f"{root}parameters.txt",
    f"{root}samples/samples_edm_00000004.png",
    *in_folder("tensorboard"),
    *in_folder("plugins/profile"),
  }
  assert list(in_folder("plugins/profile").values()) == [b"trace"]
  png = files[f"{root}samples/samples_edm_00000004.png"]
  np.testing.assert_array_equal(Image.open(io.BytesIO(png)), page(images))
  height, width, _ = page(images).shape
  sides = [str(width).encode(), str(height).encode()]
  assert len(in_folder("tensorboard")) == 2  # objects do not grow
  assert read_events(in_folder("tensorboard"), tmp_path / "read") == {
    ("loss", "scalars"): [(2, 0.5)],
    ("evaluation/fid", "scalars"): [(2, 7.0)],
    ("samples_edm", "images"): [(4, [*sides, png])],
  }
  options = epath.backend.fsspec_backend.fs(run).storage_options
  assert options["use_listings_cache"] is False  # other processes write too


def test_records_wait_for_a_flush_in_a_bucket_alone(
  store, monkeypatch, tmp_path
):
  now = [1000.0]
  monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
  local = events.EventWriter(epath.Path(tmp_path) / "local")
  remote = events.EventWriter(epath.Path("gs://bucket/tensorboard"))
  for step, seconds, num_objects in ((1, 0, 0), (2, 301, 1), (3, 299, 1)):
    now[0] += seconds
    for writer in (local, remote):
      writer.scalars(step, {"loss": step / 4})
    assert len(store()) == num_objects
  remote.flush()
  remote.flush()
  assert len(store()) == 2
  assert len(list((tmp_path / "local").iterdir())) == 1
  expected = {("loss", "scalars"): [(1, 0.25), (2, 0.5), (3, 0.75)]}
  assert read_events(store(), tmp_path / "remote") == expected
  assert tensorboard_files.read(tmp_path / "local") == expected


def test_what_a_bucket_refuses_is_one_sentence(store, monkeypatch):
  writer = log.Writer("gs://bucket/run", digits.get_config())

  def refuse(*args, **kwargs):
    raise RuntimeError("401: Invalid Credentials\n<html>")

  monkeypatch.setattr(Store, "open", refuse)
  for write in (
    lambda: writer.text("parameters.txt", "many"),
    lambda: writer.scalars(1, {"loss": 1.0}) or writer.flush(),
    lambda: workdir.enter("gs://bucket/run", digits.get_config(), {}),
  ):
    with pytest.raises(UserError) as caught:
      write()
    assert str(caught.value).startswith(
      "cannot write to the workdir gs://bucket/run: 401: Invalid Credentials;"
    )


def test_a_bucket_that_is_not_there_is_not_made(store):
  with pytest.raises(UserError, match="no bucket gs://other; check the name"):
    workdir.path_of("gs://other/run")
  assert Store.pseudo_dirs == ["", "/bucket"]


def test_a_bucket_without_gcsfs_is_refused(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"gs://b/run needs gcsfs: .*\[gcp\]"):
    workdir.path_of("gs://b/run")


def test_a_bucket_that_cannot_be_reached_is_one_sentence(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)

  def exists(self):
    raise RuntimeError("no credentials\nand much more")

  monkeypatch.setattr(epath.Path, "exists", exists, raising=False)
  monkeypatch.setattr(
    type(epath.Path("gs://b")), "exists", exists, raising=False
  )
  with pytest.raises(UserError, match="^cannot reach gs://b/run: no credent"):
    workdir.path_of("gs://b/run")
