"""Order, resumption, shards, mirroring; what comes out is what went in."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import pipeline, preparation, transforms
from diffit_jax.data.builders import digits
from diffit_jax.errors import UserError


@pytest.fixture(scope="module")
def ten(data_dir):
  return pipeline.open_dataset("ten", data_dir)


def _batches(dataset, number, **options):
  options = {"global_batch_size": 4, "seed": 0, "num_threads": 2, **options}
  with pipeline.Pipeline(dataset, **options) as batches:
    return list(itertools.islice(batches, number))


def _stream(batches):
  """{position in the stream: image}; every position once."""
  pairs = [
    (int(index), image)
    for batch in batches
    for index, image in zip(batch["index"], batch["image"])
  ]
  assert len(dict(pairs)) == len(pairs)
  return dict(pairs)


def _order(batches):
  """Which of the ten images each place of the stream shows: its red value."""
  stream = _stream(batches)
  return [int(stream[index][0, 0, 0]) for index in sorted(stream)]


def _assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_digits_come_out_as_scikit_learn_has_them(data_dir):
  from sklearn import datasets

  dataset = pipeline.open_dataset("digits", data_dir)
  assert dataset.num_images == len(dataset.source) == 1797
  assert dataset.image_shape == (8, 8, 1)
  assert dataset.num_classes == 10
  # One epoch is every digit once: compare as multisets of (pixels, label).
  (batch,) = _batches(dataset, 1, global_batch_size=1797)
  assert batch["image"].dtype == np.uint8
  assert batch["label"].dtype == np.int32
  assert batch["index"].dtype == np.uint32
  got = sorted(
    (image.tobytes(), int(label))
    for image, label in zip(batch["image"], batch["label"])
  )
  digits = datasets.load_digits()
  # floor(v * 255 / 16 + 1/2); no value lies half-way but 8, where 127.5 is
  # rounded to the even 128 as well.
  expected = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)
  assert got == sorted(
    (image.tobytes(), int(label))
    for image, label in zip(expected, digits.target)
  )


def test_each_epoch_is_another_permutation_of_everything(ten):
  order = _order(_batches(ten, 15))  # 60 images: six epochs
  epochs = [order[start : start + 10] for start in range(0, 60, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_seed_decides_the_order(ten):
  first, again = _order(_batches(ten, 10)), _order(_batches(ten, 10))
  other = _order(_batches(ten, 10, seed=1))
  assert first == again != other
  # Seeds that follow one another do not share epochs, shifted by one.
  assert first[10:20] != other[:10]


def test_resuming_gives_the_undisturbed_batches(ten):
  undisturbed = _batches(ten, 12, flip=True)
  for start in (0, 1, 5):
    resumed = _batches(ten, 12 - start, flip=True, start_index=4 * start)
    _assert_equal(resumed, undisturbed[start:])


def test_next_index_counts_consumed_images(ten):
  with pipeline.Pipeline(ten, global_batch_size=4, seed=0) as batches:
    assert batches.next_index == 0
    next(batches), next(batches)  # whatever has been fetched ahead
    assert batches.next_index == 8


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_share_out_each_global_batch(ten, num_shards):
  whole = _batches(ten, 6, flip=True, start_index=4)
  shards = [
    _batches(
      ten, 6, flip=True, start_index=4, shard_index=i, num_shards=num_shards
    )
    for i in range(num_shards)
  ]
  for step, batch in enumerate(whole):
    parts = [shard[step] for shard in shards]
    assert all(len(part["index"]) == 4 // num_shards for part in parts)
    got, expected = _stream(parts), _stream([batch])
    first = 4 + 4 * step
    assert sorted(got) == sorted(expected) == list(range(first, first + 4))
    for index in expected:
      np.testing.assert_array_equal(got[index], expected[index])


def test_threads_do_not_change_the_batches(ten):
  _assert_equal(
    _batches(ten, 8, num_threads=1, prefetch=1),
    _batches(ten, 8, num_threads=6, prefetch=6),
  )


def test_a_batch_may_be_larger_than_the_data_set(ten):
  (batch,) = _batches(ten, 1, global_batch_size=32)
  assert batch["image"].shape == (32, 4, 4, 3)
  assert batch["index"].tolist() == list(range(32))
  counts = np.bincount(batch["image"][:, 0, 0, 0])
  assert set(counts.tolist()) == {3, 4}  # three epochs and a bit


def test_mirroring_depends_on_seed_and_index_alone(ten):
  plain, flipped = (
    _stream(_batches(ten, 50, flip=flip, seed=3)) for flip in (False, True)
  )
  mirrored = []
  for index, image in plain.items():
    mirrored.append(pipeline.is_mirrored(3, index))
    expected = image[:, ::-1] if mirrored[-1] else image
    np.testing.assert_array_equal(flipped[index], expected)
  # 200 fair coins: 100 +- 7, so 60..140 is over five deviations wide.
  assert 60 < sum(mirrored) < 140
  assert mirrored != [pipeline.is_mirrored(4, index) for index in plain]


def test_a_set_without_labels_has_label_zero(ten):
  assert ten.num_classes == 0
  assert _batches(ten, 1)[0]["label"].tolist() == [0] * 4


@pytest.mark.parametrize(
  "options, message",
  [
    ({"num_shards": 3}, "batch size 4 cannot be divided over 3 hosts"),
    ({"global_batch_size": 0}, "batch size 0"),
    ({"start_index": 6}, "start_index=6 is not a multiple of the batch"),
  ],
)
def test_numbers_that_do_not_go_together_are_refused(ten, options, message):
  with pytest.raises(UserError, match=message):
    _batches(ten, 1, **options)


def test_config_and_data_must_agree(ten):
  pipeline.check_matches(ten, resolution=4, channels=3, num_classes=0)
  with pytest.raises(UserError, match="wants 64x64 images, .* has 4x4"):
    pipeline.check_matches(ten, resolution=64, channels=3, num_classes=0)
  with pytest.raises(UserError, match="wants 1 colour channels, .* has 3"):
    pipeline.check_matches(ten, resolution=4, channels=1, num_classes=0)
  with pytest.raises(UserError, match="wants 5 classes, .* has no labels"):
    pipeline.check_matches(ten, resolution=4, channels=3, num_classes=5)


def test_labels_that_the_model_ignores_do_not_matter(data_dir):
  digits = pipeline.open_dataset("digits", data_dir)
  pipeline.check_matches(digits, resolution=8, channels=1, num_classes=0)
  with pytest.raises(UserError, match="wants 9 classes, .* has 10"):
    pipeline.check_matches(digits, resolution=8, channels=1, num_classes=9)


def test_a_missing_data_set_names_the_command(tmp_path, monkeypatch):
  for name, command in [
    ("digits", "prepare digits --data_dir={dir}$"),
    ("ffhq64", "prepare ffhq64 --source=FOLDER_OR_ZIP --data_dir={dir}$"),
    (
      "cats",
      "prepare image_folder --source=FOLDER_OR_ZIP --resolution=SIDE"
      " --name=cats --data_dir={dir}$",
    ),
  ]:
    pattern = "no prepared data set .*: python -m diffit_jax." + command
    with pytest.raises(UserError, match=pattern.format(dir=tmp_path)):
      pipeline.open_dataset(name, str(tmp_path))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
  with pytest.raises(UserError, match="in .*elsewhere; make it"):
    pipeline.open_dataset("digits")


def test_data_in_a_bucket_is_refused_and_not_made_in_a_folder_gs(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  address = "gs://bucket/data"
  for use in (
    lambda: dataset_lib.open_dataset("digits", address),
    lambda: preparation.prepare(**digits.recipe(), data_dir=address),
  ):
    with pytest.raises(UserError, match=f"{address} is no local path: use a"):
      use()
  assert not any(tmp_path.iterdir())


def test_half_made_data_sets_are_not_taken_for_data(data_dir, tmp_path):
  made = dataset_lib.find_directory("digits", data_dir)
  aside = tmp_path / "digits" / "incomplete.abc" / "digits" / "1.0.0"
  aside.mkdir(parents=True)
  for file in made.iterdir():
    (aside / file.name).write_bytes(file.read_bytes())
  (tmp_path / "digits" / "1.0.0").mkdir()  # without dataset_info.json
  with pytest.raises(UserError, match="no prepared data set 'digits'"):
    pipeline.open_dataset("digits", str(tmp_path))


def _copy(data_dir, tmp_path):
  target = tmp_path / "digits" / "1.0.0"
  target.mkdir(parents=True)
  for file in dataset_lib.find_directory("digits", data_dir).iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  return target


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda d: next(d.glob("*array_record*")).unlink(), "damaged"),
    (lambda d: next(d.glob("*array_record*")).write_bytes(b""), "damaged"),
    (lambda d: (d / "features.json").unlink(), "damaged"),
    (lambda d: (d / "dataset_info.json").write_text("{"), "damaged"),
    (lambda d: _edit_info(d, splits=[]), "is empty"),
    (
      lambda d: _edit_info(d, fileFormat="tfrecord"),
      "tfrecord format, and array_record is needed; .* --overwrite",
    ),
  ],
)
def test_a_spoilt_data_set_says_how_to_remake_it(
  data_dir, tmp_path, spoil, message
):
  spoil(_copy(data_dir, tmp_path))
  pattern = f"{message}.*python -m diffit_jax.prepare digits .*--overwrite"
  if "--overwrite" in message:
    pattern = message
  with pytest.raises(UserError, match=pattern):
    pipeline.open_dataset("digits", str(tmp_path))


def _edit_info(directory: pathlib.Path, **fields) -> None:
  file = directory / "dataset_info.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_image_that_cannot_be_decoded_is_damage(ten):
  png = transforms.encode_png(np.zeros((4, 4, 3), np.uint8))
  for data in (b"no image", png[:45]):
    source = [{"image": data, "label": 0}] * 4
    spoilt = dataclasses.replace(ten, source=source, num_images=4)
    with pytest.raises(UserError, match="ten.* is damaged .*--overwrite"):
      _batches(spoilt, 1)


def test_an_unknown_split_names_the_known_ones(data_dir):
  with pytest.raises(UserError, match="no split 'test': it has train"):
    pipeline.open_dataset("digits", data_dir, split="test")
  part = pipeline.open_dataset("digits", data_dir, split="train[:100]")
  assert part.num_images == 100


def test_the_newest_version_is_read(data_dir, tmp_path):
  made = _copy(data_dir, tmp_path)
  (tmp_path / "digits" / "10.0.0").mkdir()
  for file in made.iterdir():
    (tmp_path / "digits" / "10.0.0" / file.name).write_bytes(file.read_bytes())
  found = dataset_lib.find_directory("digits", str(tmp_path))
  assert found.name == "10.0.0"


def test_reading_imports_no_tensorflow_and_starts_no_device(data_dir):
  program = f"""
import sys
from diffit_jax.data import pipeline
dataset = pipeline.open_dataset("digits", {data_dir!r})
with pipeline.Pipeline(dataset, global_batch_size=8, seed=0) as batches:
  next(batches)
assert "tensorflow" not in sys.modules
"""
  no_device = os.environ | {"JAX_PLATFORMS": "none_such"}  # JAX would fail
  subprocess.run([sys.executable, "-c", program], env=no_device, check=True)
