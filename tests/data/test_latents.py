"""Latents as a data set: what is stored, resumed, shared out and refused."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

from absl import logging
import jax
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

import commands
from diffit_jax import autoencoder
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import pipeline, preparation, shards
from diffit_jax.data.builders import image_folder, imagenet_latents
from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped
from tiny_vae import write_vae

SIDE = 16  # of the images; 4 of the latents
CLASSES = ["n02", "n01", "n10"]  # ranks 1, 0, 2
# Ranks of the first 23 numbers of Philox4x64-10, key 0 and counter 1, 2, ...,
# from its published definition in Python's integers.
ORDER = [
  *[0, 21, 2, 11, 20, 17, 9, 1, 8, 13, 5, 16],
  *[19, 22, 4, 3, 12, 10, 15, 14, 6, 18, 7],
]
BLOCKS = {"block_out_channels": [4, 8, 8], "latent_channels": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds `vae`, `other_vae`, and `images`: 23 in three classes."""
  root = tmp_path_factory.mktemp("latents")
  write_vae(root / "vae", 0, **BLOCKS)
  write_vae(root / "other_vae", 1, **BLOCKS)
  rng = np.random.default_rng(0)
  for number in range(23):
    path = root / "images" / CLASSES[number % 3] / f"{number:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (20 + number, 45 - number, 3)  # some are halved first, some not
    Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
  return root


@pytest.fixture(scope="module")
def vae(folder):
  return autoencoder.load_autoencoder(folder / "vae", chunk_size=4)


@pytest.fixture(scope="module")
def encoder(vae):
  return _encoder(vae)


def _encoder(vae):
  fields = {
    "encode": lambda x: jax.device_get(vae.encode(x)),
    "down_factor": vae.down_factor,
    "in_channels": 3,
    "latent_channels": 3,
    "scaling_factor": vae.scaling_factor,
    "hash": vae.hash,
    "source": vae.source,
  }
  return imagenet_latents.LatentEncoder(**fields)


def _prepare(folder, data_dir, encoder, source=None, **options):
  options = {"resolution": SIDE, "num_shards": 4, "batch_size": 2, **options}
  images = imagenet_latents.open_images(
    str(source or folder / "images"), str(data_dir), options["resolution"]
  )
  return imagenet_latents.prepare(
    images, encoder, data_dir=str(data_dir), **options
  )


@pytest.fixture(scope="module")
def made(folder, encoder, tmp_path_factory):
  """A data directory with the latents, made at one go."""
  data_dir = tmp_path_factory.mktemp("made")
  outcome = _prepare(folder, data_dir, encoder, latent_dtype="float32")
  assert outcome == data_dir / "imagenet_latents" / "1.0.0"
  return data_dir


def _records(data_dir, name="imagenet_latents"):
  """The records by TFDS's own reader, in their order."""
  directory = dataset_lib.find_directory(name, str(data_dir))
  return list(
    tfds.builder_from_directory(str(directory)).as_data_source("train")
  )


def _contents(data_dir):
  """Every file of the data set but the one that names folders."""
  directory = dataset_lib.find_directory("imagenet_latents", str(data_dir))
  return {
    path.name: path.read_bytes()
    for path in directory.iterdir()
    if path.name != "prepared.json"
  }


def _crop(path: pathlib.Path) -> np.ndarray:
  """ADM's centre crop, from its description (image files, GOLDENS.md)."""
  image = Image.open(path).convert("RGB")
  while min(image.size) >= 2 * SIDE:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  scale = SIDE / min(image.size)
  size = (round(image.width * scale), round(image.height * scale))
  pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
  top, left = (size[1] - SIDE) // 2, (size[0] - SIDE) // 2
  return pixels[top : top + SIDE, left : left + SIDE]


def _expected_moments(vae, pixels: np.ndarray) -> np.ndarray:
  x = (pixels.astype(np.float64) / 127.5 - 1).astype(np.float32)
  return np.concatenate(vae.encode(x[None]), axis=-1)[0]


def test_records_hold_the_moments_of_image_and_mirror(folder, vae, made):
  records = _records(made)
  assert len(records) == 23
  ids = [record["id"].decode() for record in records]
  files = sorted((folder / "images").rglob("*.png"))
  assert sorted(ids) == [str(f.relative_to(folder / "images")) for f in files]
  for name, record in zip(ids, records):
    pixels = _crop(folder / "images" / name)
    for key, each in [("moments", pixels), ("mirror_moments", pixels[:, ::-1])]:
      assert record[key].shape == (4, 4, 6)
      assert record[key].dtype == np.float32
      # Another batch may sum in another order; float32.
      expected = _expected_moments(vae, each)
      np.testing.assert_allclose(record[key], expected, rtol=1e-4, atol=1e-5)
    # The very reason for storing both.
    mirrored = record["moments"][:, ::-1]
    assert np.abs(mirrored - record["mirror_moments"]).max() > 0.01
    assert record["label"] == {"n01": 0, "n02": 1, "n10": 2}[name[:3]]


def test_the_order_mixes_the_classes_and_follows_from_the_source(made):
  order = imagenet_latents.fixed_order(23)
  assert sorted(order) == list(range(23))
  assert order.tolist() == ORDER
  names = sorted(record["id"] for record in _records(made))
  assert [record["id"] for record in _records(made)] == [
    names[number] for number in order
  ]
  labels = [record["label"] for record in _records(made)]
  changes = sum(a != b for a, b in itertools.pairwise(labels))
  assert changes > 8  # of 22; sorted classes have 2


def test_metadata_says_what_the_latents_are(folder, vae, made):
  dataset = pipeline.open_dataset("imagenet_latents", str(made))
  metadata = dataset.metadata
  weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
  assert metadata["vae"] == str(weights.parent)
  assert metadata["vae_hash"] == vae.hash
  assert metadata["scaling_factor"] == 0.18215
  assert metadata["crop"] == "adm"
  assert metadata["latent_dtype"] == "float32"
  assert metadata["latent_shape"] == [4, 4, 3]
  assert metadata["image_shape"] == [16, 16, 3]
  assert metadata["num_images"] == 23
  assert metadata["class_names"] == ["n01", "n02", "n10"]
  assert metadata["images_per_class"] == [8, 8, 7]
  assert metadata["num_skipped"] == 0
  assert metadata["source"] == str(folder / "images")
  assert dataset.kind == "latent"
  assert dataset.latent_shape == (4, 4, 3)
  assert dataset.image_shape == (16, 16, 3)
  assert (dataset.num_images, dataset.num_classes) == (23, 3)
  assert [p.name for p in (made / "imagenet_latents").iterdir()] == ["1.0.0"]


def test_float16_is_the_rounded_float32_in_half_the_bytes(
  folder, encoder, made, tmp_path
):
  _prepare(folder, tmp_path, encoder, latent_dtype="float16")
  halves, wholes = _records(tmp_path), _records(made)
  for half, whole in zip(halves, wholes):
    assert half["id"] == whole["id"]
    for key in dataset_lib.MOMENTS:
      assert half[key].dtype == np.float16
      np.testing.assert_array_equal(half[key], whole[key].astype(np.float16))
  sizes = []
  for data_dir in (tmp_path, made):
    directory = dataset_lib.find_directory("imagenet_latents", str(data_dir))
    info = json.loads((directory / "dataset_info.json").read_text())
    sizes.append(int(info["splits"][0]["numBytes"]))
  assert sizes[1] - sizes[0] == 23 * 2 * (4 * 4 * 6) * 2  # 2 bytes a number


def test_the_pipeline_picks_the_mirror_by_the_coin_of_the_index(made):
  dataset = pipeline.open_dataset("imagenet_latents", str(made))

  def read(flip):
    with pipeline.Pipeline(
      dataset, global_batch_size=23, seed=5, flip=flip, num_threads=2
    ) as batches:
      return list(itertools.islice(batches, 4))

  records = {record["moments"].tobytes(): record for record in _records(made)}
  num_mirrored = 0
  for plain, flipped in zip(read(False), read(True)):
    assert sorted(plain) == ["index", "label", "moments"]
    assert plain["moments"].shape == (23, 4, 4, 6)
    assert plain["moments"].dtype == np.float32
    np.testing.assert_array_equal(plain["index"], flipped["index"])
    for i, index in enumerate(plain["index"]):
      record = records[plain["moments"][i].tobytes()]
      assert plain["label"][i] == flipped["label"][i] == record["label"]
      mirrored = pipeline.is_mirrored(5, int(index))
      num_mirrored += mirrored
      key = "mirror_moments" if mirrored else "moments"
      np.testing.assert_array_equal(flipped["moments"][i], record[key])
  assert 20 < num_mirrored < 72  # of 92 fair coins: 46 +- 5


def test_hosts_together_make_what_one_makes(folder, encoder, made, tmp_path):
  options = {"latent_dtype": "float32", "num_parts": 2}
  assert _prepare(folder, tmp_path, encoder, part=1, **options) is None
  with pytest.raises(UserError, match="no prepared data set"):
    pipeline.open_dataset("imagenet_latents", str(tmp_path))
  staged = tmp_path / "imagenet_latents" / "partial" / "1.0.0"
  assert [path.name[-14:] for path in sorted(staged.iterdir())] == [
    "00001-of-00004",
    "00003-of-00004",
  ]
  outcome = _prepare(folder, tmp_path, encoder, part=0, **options)
  assert outcome is not None
  assert _contents(tmp_path) == _contents(made)
  # A host that comes late finds the set and leaves it alone.
  assert _prepare(folder, tmp_path, encoder, part=1, **options) == outcome


def test_a_lock_that_another_host_frees_meanwhile_stops_nothing(
  folder, encoder, tmp_path, monkeypatch
):
  real, calls = shutil.rmtree, []

  def rmtree(path, **options):
    calls.append(path)
    if len(calls) == 1:
      raise FileNotFoundError("00002.lock")
    real(path, **options)

  monkeypatch.setattr(shutil, "rmtree", rmtree)
  assert _prepare(folder, tmp_path, encoder, latent_dtype="float32")
  (left,) = (tmp_path / "imagenet_latents").iterdir()
  assert left.name == "1.0.0" and len(calls) == 2


def test_hosts_at_the_same_time(folder, encoder, made, tmp_path):
  outcomes = {}

  def host(part):
    outcomes[part] = _prepare(
      folder,
      tmp_path,
      encoder,
      part=part,
      num_parts=3,
      latent_dtype="float32",
    )

  threads = [threading.Thread(target=host, args=(part,)) for part in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert any(outcome for outcome in outcomes.values())
  assert _contents(tmp_path) == _contents(made)
  names = [path.name for path in (tmp_path / "imagenet_latents").iterdir()]
  assert names == ["1.0.0"]


def test_two_at_one_shard_are_kept_apart(folder, encoder, tmp_path):
  def meddle(x):
    with pytest.raises(UserError, match=r"another prepare is writing shard \d"):
      _prepare(folder, tmp_path, encoder)
    return encoder.encode(x)

  outcome = _prepare(
    folder,
    tmp_path,
    dataclasses.replace(encoder, encode=meddle),
  )
  assert outcome is not None


def test_a_stop_keeps_finished_shards_and_drops_the_unfinished(
  folder, encoder, made, tmp_path
):
  asked = itertools.count()  # shards of 5, 6, 6, 6 images: 3 batches each
  stop = lambda: next(asked) == 4
  options = {"latent_dtype": "float32"}
  with pytest.raises(Stopped):
    _prepare(folder, tmp_path, encoder, should_stop=stop, **options)
  partial = tmp_path / "imagenet_latents" / "partial"
  assert sorted(path.name for path in partial.iterdir()) == [
    "00000.json",
    "1.0.0",
    "settings.json",
  ]
  num_encoded = []

  def encode(x):
    num_encoded.append(len(x) // 2)
    return encoder.encode(x)

  counted = dataclasses.replace(encoder, encode=encode)
  assert _prepare(folder, tmp_path, counted, **options)
  assert sum(num_encoded) == 18
  assert _contents(tmp_path) == _contents(made)


def test_a_begun_set_refuses_other_vaes_crops_types_and_sources(
  folder, encoder, tmp_path, write_images
):
  _prepare(folder, tmp_path, encoder, part=1, num_parts=2)
  other = autoencoder.load_autoencoder(folder / "other_vae")
  both = f"vae_hash is '{encoder.hash}' there and '{other.hash}'"
  both += ".*vae is .*/vae' there and .*/other_vae'.*to mix"
  other = _encoder(other)
  with pytest.raises(UserError, match=both):
    _prepare(folder, tmp_path, other)
  with pytest.raises(UserError, match="latent_dtype is 'float16' there and"):
    _prepare(folder, tmp_path, encoder, latent_dtype="float32")
  with pytest.raises(UserError, match="resolution is 16 there and 20"):
    _prepare(folder, tmp_path, encoder, resolution=20)
  with pytest.raises(UserError, match="num_shards is 4 there and 5"):
    _prepare(folder, tmp_path, encoder, num_shards=5)
  with pytest.raises(UserError, match="scaling_factor is 0.18215 there and 1"):
    _prepare(folder, tmp_path, dataclasses.replace(encoder, scaling_factor=1.0))
  source = write_images(
    tmp_path / "images", [f"a/{i}.png" for i in range(4)], size=(16, 16)
  )
  with pytest.raises(
    UserError, match="source_listing is .*source is .*/imag"
  ):
    _prepare(folder, tmp_path, encoder, source=source)
  # Other settings after all: what was there is dropped, and only then.
  outcome = _prepare(folder, tmp_path, other, overwrite=True)
  metadata = dataset_lib.read_metadata(outcome)
  assert metadata["vae_hash"] == other.hash
  with pytest.raises(UserError, match="made with other settings .vae_hash is"):
    _prepare(folder, tmp_path, encoder)


def test_the_finish_of_a_killed_prepare_is_taken_up(
  folder, encoder, made, tmp_path, monkeypatch
):
  options = {"latent_dtype": "float32"}
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(shards.ShardedSet, "_write_metadata", _interrupt)
    _prepare(folder, tmp_path, encoder, **options)
  assert dataset_lib.find_directory("imagenet_latents", str(tmp_path)) is None
  never = dataclasses.replace(encoder, encode=_interrupt)
  assert _prepare(folder, tmp_path, never, **options)
  assert _contents(tmp_path) == _contents(made)


def _interrupt(*_):
  raise KeyboardInterrupt


def test_latents_that_are_there_need_no_lock(
  folder, encoder, made, monkeypatch
):
  def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(preparation, "lock", refuse)
  found = _prepare(folder, made, encoder, latent_dtype="float32")
  assert found == made / "imagenet_latents" / "1.0.0"


def test_a_damaged_shard_is_made_again(folder, encoder, made, tmp_path):
  options = {"latent_dtype": "float32"}
  _prepare(folder, tmp_path, encoder, part=1, num_parts=2, **options)
  partial = tmp_path / "imagenet_latents" / "partial"
  shard = next((partial / "1.0.0").glob("*00003-of*"))
  shard.write_bytes(shard.read_bytes()[:100])
  (partial / "00001.json").write_text('{"num_records": 4,')
  settings = (partial / "settings.json").read_text()
  (partial / "settings.json").write_text(settings[:20])
  with pytest.raises(UserError, match="settings.json is damaged.*--overwrite"):
    _prepare(folder, tmp_path, encoder, **options)
  (partial / "settings.json").write_text(settings)
  assert _prepare(folder, tmp_path, encoder, **options)
  assert _contents(tmp_path) == _contents(made)


def test_prepared_images_give_the_latents_of_their_files(
  folder, encoder, made, tmp_path
):
  source = str(folder / "images")
  recipe = image_folder.recipe(source, name="imgs", resolution=SIDE, crop="adm")
  preparation.prepare(**recipe, data_dir=str(tmp_path))
  _prepare(folder, tmp_path, encoder, source="imgs", latent_dtype="float32")
  names = [record["id"] for record in _records(tmp_path, "imgs")]
  wanted = {record["id"]: record for record in _records(made)}
  found = _records(tmp_path)
  assert sorted(record["id"] for record in found) == [
    b"train/%08d" % number for number in range(23)
  ]
  for record in found:
    other = wanted[names[int(record["id"][-8:])]]
    assert record["label"] == other["label"]
    for key in dataset_lib.MOMENTS:  # batches differ, so the last bits may
      np.testing.assert_allclose(record[key], other[key], rtol=1e-4, atol=1e-5)
  metadata = pipeline.open_dataset("imagenet_latents", str(tmp_path)).metadata
  assert metadata["class_names"] == ["n01", "n02", "n10"]
  with pytest.raises(UserError, match="holds latents already"):
    _prepare(folder, tmp_path, encoder, source="imagenet_latents", name="x")


class Wild(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Images of many sizes with classes, as TFDS's own ImageNet."""

  VERSION = tfds.core.Version("1.0.0")
  files: list[pathlib.Path] = []

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(names=sorted(CLASSES)),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for file in self.files:
      example = {"image": file.read_bytes(), "label": file.parent.name}
      yield str(file), example


def test_images_of_many_sizes_that_tfds_prepared(
  folder, encoder, made, tmp_path
):
  Wild.files = sorted((folder / "images").rglob("*.png"))
  builder = Wild(data_dir=str(tmp_path), file_format="array_record")
  builder.download_and_prepare()
  _prepare(folder, tmp_path, encoder, source="wild", latent_dtype="float32")
  sums = lambda data_dir: sorted(
    (record["label"], record["mirror_moments"].sum())
    for record in _records(data_dir)
  )
  np.testing.assert_allclose(sums(tmp_path), sums(made), rtol=1e-4, atol=1e-3)
  with pytest.raises(UserError, match="no images of one size"):
    pipeline.open_dataset("wild", str(tmp_path))


def test_prepared_images_of_another_crop_are_refused(folder, encoder, tmp_path):
  source = str(folder / "images")
  for name, fit in {
    "edm": {"resolution": SIDE, "crop": "edm"},
    "large": {"resolution": 32, "crop": "adm"},
  }.items():
    recipe = image_folder.recipe(source, name=name, **fit)
    preparation.prepare(**recipe, data_dir=str(tmp_path))
  with pytest.raises(UserError, match="cropped by edm to 16x16.* need adm"):
    _prepare(folder, tmp_path, encoder, source="edm")
  with pytest.raises(UserError, match="adm to 32x32, and latents of 16x16"):
    _prepare(folder, tmp_path, encoder, source="large")


def test_unreadable_images_are_skipped_named_and_limited(
  encoder, tmp_path, write_images, caplog
):
  names = [f"{c}/{i}.png" for c in "ab" for i in range(6)]
  source = write_images(tmp_path / "source", names, size=(20, 16))
  for name in ("a/2.png", "b/5.png"):
    (source / name).write_bytes(b"damaged")
  with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
    with pytest.raises(UserError, match="1 of the 12 images .*=0.01 allows"):
      _prepare(None, tmp_path, encoder, source=source)
  assert ".png, skipped: no PNG, JPEG or WebP" in caplog.text
  # One shard for each image: two of them stay empty.
  options = {"source": source, "num_shards": 12, "name": "some"}
  outcome = _prepare(None, tmp_path, encoder, max_bad_fraction=0.2, **options)
  metadata = dataset_lib.read_metadata(outcome)
  assert metadata["num_images"] == 10
  assert sorted(metadata["skipped"]) == ["a/2.png", "b/5.png"]
  dataset = pipeline.open_dataset("some", str(tmp_path))
  assert len(list(dataset.source)) == 10
  # Each part is below the limit, and the whole is not.
  options |= {"name": "parts", "max_bad_fraction": 0.1, "num_parts": 12}
  with pytest.raises(UserError, match="2 of the 12 images .*such as"):
    for part in range(12):
      _prepare(None, tmp_path, encoder, part=part, **options)


def test_no_readable_image_at_all(encoder, tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  (source / "a.png").write_bytes(b"damaged")
  options = {"num_shards": 1, "max_bad_fraction": 1.0}
  with pytest.raises(UserError, match="no image of .* could be read"):
    _prepare(None, tmp_path, encoder, source=source, **options)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"resolution": 18}, "resolution=18 must be a multiple of 4.*/vae"),
    ({"num_shards": 24}, "num_shards=24 must be from 1 to .* 23"),
    ({"num_shards": 0}, "num_shards=0 must be"),
    (
      {"latent_dtype": "bfloat16"},
      "'bfloat16' must be one of float16, float32",
    ),
    ({"source": "gone"}, "gone is neither a folder .* in /"),
  ],
)
def test_numbers_that_do_not_fit_are_refused(
  folder, encoder, tmp_path, options, message
):
  with pytest.raises(UserError, match=message):
    _prepare(folder, tmp_path, encoder, **options)
  assert not list(tmp_path.iterdir())


def test_latents_that_are_no_numbers_are_refused(folder, encoder, tmp_path):
  def encode(x):
    mean, logvar = encoder.encode(x)
    return mean * 1e6, logvar  # more than 65504

  large = dataclasses.replace(encoder, encode=encode)
  with pytest.raises(
    UserError, match="gives numbers for n.*float16 cannot hold"
  ):
    _prepare(folder, tmp_path, large)


def test_config_and_latents_must_agree(made, vae, data_dir):
  dataset = pipeline.open_dataset("imagenet_latents", str(made))
  good = {"side": 4, "channels": 3, "num_classes": 3}
  good |= {"vae_hash": vae.hash, "scaling_factor": 0.18215}
  pipeline.check_latents(dataset, **good)
  pipeline.check_latents(dataset, side=4, channels=3, num_classes=0)
  for wrong, message in [
    ({"side": 32}, "wants latents of 32x32, .* has 4x4"),
    ({"channels": 4}, "wants 4 latent channels, .* has 3 .*6 numbers"),
    ({"num_classes": 1000}, "wants 1000 classes, .* has 3"),
    ({"vae_hash": "abc"}, f"encoded by .*/vae .SHA-256 {vae.hash}.*6 abc"),
    ({"scaling_factor": 0.13025}, "by 0.13025, .* asks for 0.18215"),
  ]:
    with pytest.raises(UserError, match=message):
      pipeline.check_latents(dataset, **good | wrong)
  with pytest.raises(UserError, match="wants images, .* holds latents"):
    pipeline.check_matches(dataset, 16, 3, 3)
  images = pipeline.open_dataset("digits", data_dir)
  with pytest.raises(UserError, match="wants latents, .* holds images"):
    pipeline.check_latents(images, **good)


def test_spoilt_latents_say_how_to_remake_them(folder, encoder, tmp_path):
  directory = _prepare(folder, tmp_path, encoder, name="mine")
  (directory / "features.json").unlink()
  command = (
    "prepare imagenet_latents --source=.* --vae=.* --name=mine .*--overw"
  )
  with pytest.raises(UserError, match=f"damaged .*{command}"):
    pipeline.open_dataset("mine", str(tmp_path))
  (directory / "prepared.json").write_text("{")
  with pytest.raises(UserError, match="damaged .prepared.json"):
    pipeline.open_dataset("mine", str(tmp_path))


# The command, in processes of its own.


def _without_tensorflow(tmp_path) -> dict[str, str]:
  absent = tmp_path / "modules" / "tensorflow.py"
  absent.parent.mkdir()
  absent.write_text("raise ImportError('not installed')\n")
  return {"PYTHONPATH": str(absent.parent)}


def _command(source, folder, data_dir) -> str:
  return (
    f"prepare imagenet_latents --source={source} --vae={folder}/vae"
    f" --resolution={SIDE} --num_shards=4 --latent_dtype=float32"
    f" --data_dir={data_dir} --batch_size=2"
  )


@contextlib.contextmanager
def _a_pipe_instead_of(path: pathlib.Path):
  """Turns a file into a pipe of the same contents; yields `open` and `feed`.

  `open` waits for the reader, `feed` gives it what it came for.
  """
  data = path.read_bytes()
  path.unlink()
  os.mkfifo(path)

  def wait(process):
    deadline = time.monotonic() + 60
    while True:
      assert process.poll() is None, process.communicate()[1]
      assert time.monotonic() < deadline
      try:  # fails until somebody reads
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
      except OSError:
        time.sleep(0.02)

  def feed(pipe):
    os.write(pipe, data)
    os.close(pipe)

  yield wait, feed


@pytest.mark.slow
def test_kill_9_and_sigterm_in_the_middle_change_nothing(folder, tmp_path):
  # A pipe in the third of the four shards holds every process up there.
  source = tmp_path / "images"
  for path in (folder / "images").rglob("*.png"):
    target = source / path.relative_to(folder / "images")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(path.read_bytes())
  names = sorted(str(path) for path in source.rglob("*.png"))
  held = pathlib.Path(names[imagenet_latents.fixed_order(23)[13]])
  env = _without_tensorflow(tmp_path)
  command = _command(source, folder, tmp_path / "data")
  root = tmp_path / "data" / "imagenet_latents"

  def finished():
    files = (root / "partial" / "1.0.0").iterdir()
    return {
      f.name[-14:-9]: (f.stat().st_mtime_ns, f.read_bytes()) for f in files
    }

  with _a_pipe_instead_of(held) as (wait, feed):
    process = commands.start(command, **env)
    pipe = wait(process)
    while len(finished()) < 2:
      time.sleep(0.02)
    process.kill()
    process.communicate()
    os.close(pipe)
    assert list((root / "partial").glob("*.partial"))
    with pytest.raises(UserError, match="no prepared data set .*imagenet_lat"):
      pipeline.open_dataset("imagenet_latents", str(tmp_path / "data"))
    after_kill = finished()
    assert sorted(after_kill) == ["00000", "00001"]

    process = commands.start(command, **env)
    pipe = wait(process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    feed(pipe)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert not list((root / "partial").glob("*.partial"))
    assert finished() == after_kill

    process = commands.start(command, **env)
    feed(wait(process))
    stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  assert stdout == f"{root}/1.0.0\n"
  assert "2 of 4 here are done" in stderr

  other = tmp_path / "other"
  commands.succeed(_command(folder / "images", folder, other), **env)
  assert _contents(tmp_path / "data") == _contents(other)


def test_every_device_of_a_host_encodes(folder, made, tmp_path):
  commands.succeed(
    _command(folder / "images", folder, tmp_path),
    XLA_FLAGS="--xla_force_host_platform_device_count=3",
  )
  for found, wanted in zip(_records(tmp_path), _records(made)):
    assert found["id"] == wanted["id"]
    for key in dataset_lib.MOMENTS:  # batches differ, so the last bits may
      np.testing.assert_allclose(found[key], wanted[key], rtol=1e-4, atol=1e-5)


def test_reading_latents_needs_no_tensorflow_and_no_device(made, tmp_path):
  program = f"""
import sys
from diffit_jax.data import pipeline
dataset = pipeline.open_dataset("imagenet_latents", {str(made)!r})
with pipeline.Pipeline(
  dataset, global_batch_size=8, seed=0, flip=True
) as batches:
  assert next(batches)["moments"].shape == (8, 4, 4, 6)
assert "tensorflow" not in sys.modules
"""
  subprocess.run(
    [sys.executable, "-c", program],
    check=True,
    env=os.environ
    | _without_tensorflow(tmp_path)
    | {"JAX_PLATFORMS": "none_such"},  # with which JAX would fail
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    ("--source=x --resolution=16", "needs --vae=FOLDER"),
    ("--source=x --vae=v --resolution=16 --crop=adm", "takes no --crop"),
    ("--source=x --vae=v --resolution=16 --shard=2/2", "--shard=2/2 must be"),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
  line = commands.last_error(
    f"prepare imagenet_latents {arguments} --data_dir={tmp_path}"
  )
  assert message in line
  assert not list(tmp_path.iterdir())
