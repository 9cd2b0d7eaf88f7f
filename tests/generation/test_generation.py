"""Generator, job and weights: who decides a sample, and what is written."""

import dataclasses
import importlib.util
import json
import os
import signal

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from configs import digits
from diffit_jax import claim, models
from diffit_jax.errors import UserError
from diffit_jax.generation import generator, job, output, weights
from diffit_jax.generation.labels import choose_labels
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.interop import files, native
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.stop import Stopped


def one_device():
  return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def loaded():
  """Random weights of the digits' debug network, no layer near zero."""
  config = digits.get_config("debug")
  shapes = files.parameter_shapes(config)
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  params = tree.unflatten(
    [rng.normal(size=a.shape, scale=0.1).astype(a.dtype) for a in leaves]
  )
  return weights.Weights(params, config, 4, "edm", "a test")


def test_a_run_in_a_bucket_needs_gcsfs(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match="gs://b/run needs gcsfs: pip install"):
    weights.read_config("gs://b/run")


_made = {}


def make(loaded, mesh=None):
  """Generators are functions of config and mesh: each is compiled once."""
  mesh = mesh or one_device()
  made = (loaded.config.to_json_best_effort(), mesh)
  if made not in _made:
    model = models.make_model(loaded.config.model)
    _made[made] = generator.make_generator(model, loaded.config, mesh)
  generate = _made[made]
  return lambda index, labels, seed=0: np.asarray(
    generate(
      loaded.params, seed, np.uint32(index), np.asarray(labels, np.int32)
    )
  )


def test_weights_trained_with_cudnn_attention_sample_without_a_gpu(
  loaded, tmp_path
):
  index, labels = np.arange(2), np.arange(2)
  expected = make(loaded)(index, labels)
  config = loaded.config.copy_and_resolve_references()
  config.model.attention = "cudnn"
  path = tmp_path / "cudnn.safetensors"
  files.write_weights(path, loaded.params, config, step=4, ema="edm")
  read = weights.from_file(path, one_device())
  model = models.make_model(read.config.model)
  run = generator.make_generator(model, read.config, one_device())
  found = run(read.params, 0, np.uint32(index), np.int32(labels))
  np.testing.assert_array_equal(found, expected)


def assert_close(a, b):
  """Rounding before the cut to uint8 can move a value by one."""
  assert a.dtype == b.dtype == np.uint8
  assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


class TestGenerator:
  index, labels = np.arange(8), np.arange(8)

  def test_a_sample_depends_on_its_index_and_not_on_the_batch(self, loaded):
    generate = make(loaded)
    whole = generate(self.index, self.labels)
    assert whole.shape == (8, 8, 8, 1) and whole.std() > 10
    part = generate([5, 2], [5, 2])
    assert_close(part, whole[[5, 2]])
    np.testing.assert_array_equal(generate(self.index, self.labels), whole)

  def test_seed_and_index_both_matter(self, loaded):
    generate = make(loaded)
    a = generate([0, 1], [0, 0])
    assert (a[0] != a[1]).any()
    assert (generate([0, 1], [0, 0], seed=1) != a).any()
    assert (generate([0, 1], [3, 0])[0] != a[0]).any()

  def test_eight_devices_equal_one(self, loaded):
    assert_close(
      make(loaded, make_mesh())(self.index, self.labels),
      make(loaded)(self.index, self.labels),
    )

  def test_stochastic_sampling_is_keyed_on_the_sample_too(self, loaded):
    config = loaded.config.copy_and_resolve_references()
    config.sampler.solver_options = "S_churn=20.0"
    generate = make(dataclasses.replace(loaded, config=config))
    churned = generate(self.index, self.labels)
    assert (churned != make(loaded)(self.index, self.labels)).any()
    assert_close(generate([6, 1], [6, 1]), churned[[6, 1]])

  def test_guidance_of_1_is_the_conditional_network(self, loaded):
    """And other scales are not; with scale 0 the label has no influence."""

    def run(scale, labels):
      config = loaded.config.copy_and_resolve_references()
      config.sampler.guidance_scale = scale
      return make(dataclasses.replace(loaded, config=config))([0, 1], labels)

    assert (run(1.0, [3, 4]) != run(2.0, [3, 4])).any()
    assert_close(run(0.0, [3, 4]), run(0.0, [5, 6]))

  @pytest.mark.parametrize(
    "fields, message",
    [
      (dict(guidance_scale=np.nan), "must be finite"),
      (
        dict(guidance_channels=2),
        "guidance_channels=2 must be from 1 to the 1",
      ),
      (dict(guidance_schedule="power_cosine"), "has noise levels: use const"),
      (dict(guidance_rate=2), "there is no sampler field guidance_rate"),
      (dict(solver_options="S_churn"), "write name=value"),
      (dict(solver_options="eta=1"), "no option 'eta'"),
      (dict(solver="ddim"), "not for a model of diffusion.kind='edm'"),
    ],
    ids=str,
  )
  def test_sampler_fields_that_cannot_work(self, fields, message, loaded):
    config = loaded.config.copy_and_resolve_references()
    with config.unlocked():
      config.sampler.update(fields)
    with pytest.raises(UserError, match=message):
      SamplerOptions.from_config(config)

  def test_samples_that_are_not_finite_are_refused(self, loaded):
    params = jax.tree.map(lambda a: a * np.nan, loaded.params)
    with pytest.raises(UserError, match="not finite"):
      make(dataclasses.replace(loaded, params=params))([0], [0])

  def test_guidance_is_refused_where_the_model_cannot_give_it(self, loaded):
    config = loaded.config.copy_and_resolve_references()
    config.diffusion.label_drop_prob = 0.0
    with pytest.raises(UserError, match="label dropout"):
      make(dataclasses.replace(loaded, config=config))
    config.model.num_classes = 0
    with pytest.raises(UserError, match="unconditional"):
      make(dataclasses.replace(loaded, config=config))


class TestLabels:
  def test_dealt_out_in_turn(self):
    choose = lambda text: choose_labels(np.arange(5), 0, 10, text)
    assert choose("3").tolist() == [3] * 5
    assert choose("0-2,7").tolist() == [0, 1, 2, 7, 0]

  def test_random_labels_follow_the_index_and_are_uniform(self):
    choose = lambda index: choose_labels(index, 1, 10)
    many = choose(np.arange(5000))
    np.testing.assert_array_equal(choose(np.array([70, 3])), many[[70, 3]])
    counts = np.bincount(many, minlength=10)
    assert len(counts) == 10 and abs(counts - 500).max() < 100  # 4.7 sigma

  @pytest.mark.parametrize("text", ["11", "-1", "0-11", "a", "", "3-1"])
  def test_labels_out_of_range_are_refused(self, text):
    with pytest.raises(UserError, match="labels"):
      choose_labels(np.arange(2), 0, 10, text)

  def test_the_number_of_classes_is_no_class(self):
    assert choose_labels(np.arange(2), 0, 10, "10").tolist() == [
      10,
      10,
    ]

  def test_unconditional_models_take_none(self):
    assert choose_labels(np.arange(2), 0, 0).tolist() == [0, 0]
    with pytest.raises(UserError, match="unconditional"):
      choose_labels(np.arange(2), 0, 0, "3")


def run_job(loaded, out, num=10, **kwargs):
  options = {"seed": 0, "labels": "0-9", "batch_size": 4, **kwargs}
  return job.sample_to_folder(loaded, one_device(), out, num=num, **options)


class TestJob:
  def test_writes_images_grid_and_npz(self, loaded, tmp_path):
    result = run_job(loaded, tmp_path)
    assert result.npz.name == "samples_10x8x8x3.npz"
    with np.load(result.npz, allow_pickle=False) as file:
      images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == list(range(10))
    for i in range(10):
      png = np.asarray(Image.open(tmp_path / "images" / f"{i:06d}.png"))
      np.testing.assert_array_equal(images[i], np.repeat(png[..., None], 3, -1))
    assert_close(images[..., :1], make(loaded)(np.arange(10), labels))
    assert not list(tmp_path.rglob("*.partial"))

  def test_an_interrupted_job_ends_with_the_same_bits(self, loaded, tmp_path):
    whole = run_job(loaded, tmp_path / "a").npz.read_bytes()
    run_job(loaded, tmp_path / "b", num=3)
    kept = tmp_path / "b" / "images" / "000001.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "b" / "images" / "000002.png").unlink()
    assert run_job(loaded, tmp_path / "b").npz.read_bytes() == whole
    assert kept.stat().st_mtime_ns == before

  def test_sigterm_ends_between_batches(self, loaded, tmp_path, monkeypatch):
    real = job._write_batch

    def write_batch(*args):
      os.kill(os.getpid(), signal.SIGTERM)
      return real(*args)

    with monkeypatch.context() as patch:
      patch.setattr(job, "_write_batch", write_batch)
      with pytest.raises(Stopped):
        run_job(loaded, tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 4
    assert run_job(loaded, tmp_path) is not None

  def test_a_folder_in_use_is_refused_and_a_lost_one_left(
    self, loaded, tmp_path, monkeypatch
  ):
    out = tmp_path / "out"
    place = out / ".sampling.claim"
    with (
      claim.exclusive(place, "--out", out),
      pytest.raises(UserError, match=f"--out=.* in use by .* {os.getpid()} on"),
    ):
      run_job(loaded, out)
    assert not list(out.iterdir())
    real = job._write_batch

    def write_batch(*args):
      place.write_text("another's")
      return real(*args)

    monkeypatch.setattr(job, "_write_batch", write_batch)
    with pytest.raises(UserError, match="was taken over by another process"):
      run_job(loaded, out)
    assert len(list((out / "images").iterdir())) == 4
    assert place.read_text() == "another's"

  @pytest.mark.parametrize(
    "change", [dict(seed=1), dict(labels="3"), dict(params=None)], ids=str
  )
  def test_a_folder_of_other_samples_is_refused(self, change, loaded, tmp_path):
    run_job(loaded, tmp_path, num=2)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    if "params" in change:
      change = {}
      params = jax.tree.map(lambda a: a + 1, loaded.params)
      loaded = dataclasses.replace(loaded, params=params)
    with pytest.raises(UserError, match="other settings"):
      run_job(loaded, tmp_path, **change)
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))

  @pytest.mark.parametrize("settings", [None, '{"seed"', "[]"])
  @pytest.mark.parametrize(
    "stray", ["images/000001.png", "latents/000000.npy", "samples_2x8x8x3.npz"]
  )
  def test_samples_of_unknown_settings_are_refused(
    self, settings, stray, loaded, tmp_path
  ):
    """They would pass for those of another seed, and stay as they are."""
    (tmp_path / stray).parent.mkdir(exist_ok=True)
    (tmp_path / stray).write_bytes(b"whatever")
    if settings:
      (tmp_path / "sampling.json").write_text(settings)
    before = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"{stray}\) and no readable sampling"):
      run_job(loaded, tmp_path)
    assert before == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*"))

  def test_damaged_samples_are_named_and_made_anew(
    self, loaded, tmp_path, caplog
  ):
    """Cut, of another size or kind, no image, and a bit flipped inside."""
    whole = run_job(loaded, tmp_path).npz.read_bytes()
    path = lambda i: tmp_path / "images" / f"{i:06d}.png"
    good = {i: path(i).read_bytes() for i in range(10)}
    path(1).write_bytes(good[1][:60])
    path(2).write_bytes(b"")
    Image.new("L", (16, 8)).save(path(3))
    Image.new("RGB", (8, 8)).save(path(5))
    path(7).write_bytes(bytes(len(good[7])))
    flipped = bytearray(good[8])
    flipped[45] ^= 1
    path(8).write_bytes(flipped)
    kept = path(6).stat().st_mtime_ns
    (tmp_path / "samples_10x8x8x3.npz").unlink()
    with caplog.at_level("WARNING"):
      assert run_job(loaded, tmp_path).npz.read_bytes() == whole
    ends, inside = (r.getMessage() for r in caplog.records)
    assert ends.startswith("5 samples in") and inside.startswith("1 samples in")
    for text in (
      "000001.png is cut short, 000002.png is no PNG, 000003.png is of another"
      " size or type, 000005.png is of another size or type, 000007.png is no",
    ):
      assert text in ends
    assert "000008.png is unreadable (" in inside
    assert {i: path(i).read_bytes() for i in range(10)} == good
    assert path(6).stat().st_mtime_ns == kept

  def test_a_sample_that_stays_damaged_ends_the_job(
    self, loaded, tmp_path, monkeypatch
  ):
    def fail(path):
      raise ValueError("bad sector")

    kind = dataclasses.replace(output.IMAGES, read=fail)
    monkeypatch.setattr(job, "IMAGES", kind)
    with pytest.raises(UserError, match="just written.*bad sector.*that disk"):
      run_job(loaded, tmp_path, num=2)
    assert not list(tmp_path.glob("*.npz*"))

  def test_damaged_latents_are_found(self, tmp_path, caplog):
    run = output.Output(tmp_path, output.LATENTS, (4, 4, 2))
    tmp_path.joinpath("latents").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
      run.write(i, rng.normal(size=(4, 4, 2)).astype(np.float32))
    data = run.path(0).read_bytes()
    run.path(1).write_bytes(data[:-4])
    run.path(2).write_bytes(data[:30])
    run.path(3).unlink()
    np.save(run.path(4), np.zeros((4, 4, 2)))
    np.save(run.path(5), np.zeros((2, 4, 4), np.float32))
    assert run.missing(6) == [1, 2, 3, 4, 5]
    assert "000003" not in caplog.text and "4 samples in" in caplog.text
    assert "000002.npy is damaged, 000004.npy is of another" in caplog.text

  def test_wrong_labels_leave_nothing_behind(self, loaded, tmp_path):
    with pytest.raises(UserError, match="beyond the model's classes 0..9"):
      run_job(loaded, tmp_path / "out", labels="11")
    assert not (tmp_path / "out").exists()


class TestExportedFile:
  def save(self, loaded, path, **header):
    native.save(
      path,
      loaded.params,
      {
        "config": loaded.config.to_json_best_effort(),
        "step": "4",
        "ema": "edm",
        **header,
      },
    )
    return path

  def test_round_trip_is_exact(self, loaded, tmp_path):
    path = self.save(loaded, tmp_path / "a.safetensors")
    again = weights.from_file(path, one_device())
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert json.loads(again.config.to_json()) == json.loads(
      loaded.config.to_json()
    )
    assert (again.step, again.ema) == (4, "edm")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

  def test_damaged_and_foreign_files_are_refused(self, loaded, tmp_path):
    path = self.save(loaded, tmp_path / "a.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
      weights.from_file(path, one_device())
    path.write_bytes(b"\x80\x04\x95" + bytes(100))  # a pickle begins so
    with pytest.raises(UserError, match="is a pickle.*never loaded; convert"):
      weights.from_file(path, one_device())
    with pytest.raises(UserError, match="is not a file"):
      weights.from_file(tmp_path / "none.safetensors", one_device())
    with pytest.raises(UserError, match="must end in .safetensors"):
      self.save(loaded, tmp_path / "a.pth")
    save_file({"a": np.zeros(1, np.float32)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="missing.*pos_embed"):
      weights.from_file(path, one_device())

  def test_every_wrong_parameter_is_named(self, loaded, tmp_path):
    params = {**loaded.params, "extra": {"kernel": np.zeros(2, np.float32)}}
    params["head"] = {"kernel": np.zeros((3, 3), np.float32)}
    path = self.save(
      dataclasses.replace(loaded, params=params), tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError) as error:
      weights.from_file(path, one_device())
    for text in ("missing head/bias", "unknown extra/kernel", "head/kernel is"):
      assert text in str(error.value)

  def test_another_average_than_the_file_holds(self, loaded, tmp_path):
    path = self.save(loaded, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds only 'edm'"):
      weights.from_file(path, one_device(), "none")
