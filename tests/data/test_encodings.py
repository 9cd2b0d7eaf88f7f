"""Images stored as pixels or as PNG files: the same batches, and the choice."""

import itertools
import json

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import pipeline, preparation
from diffit_jax.data.builders import digits, image_folder
from diffit_jax.errors import UserError


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """{encoding: the same 40 images of two classes, 12x12, stored so}."""
  root = tmp_path_factory.mktemp("both")
  rng = np.random.default_rng(0)
  for number in range(40):
    path = root / "source" / f"class{number % 2}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(path)
  sets = {}
  for encoding in ("png", "raw"):
    recipe = image_folder.recipe(
      str(root / "source"), name=encoding, resolution=12, encoding=encoding
    )
    preparation.prepare(**recipe, data_dir=str(root))
    sets[encoding] = pipeline.open_dataset(encoding, str(root))
  return sets


def _batches(dataset, number=12, **options):
  options = {"global_batch_size": 8, "seed": 5, "flip": True, **options}
  with pipeline.Pipeline(dataset, **options) as batches:
    return list(itertools.islice(batches, number))


def _assert_equal(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      np.testing.assert_array_equal(a[key], b[key])


def test_the_sets_differ_in_their_records_alone(both):
  png, raw = both["png"], both["raw"]
  assert (png.encoding, raw.encoding) == ("png", "raw")
  assert isinstance(png.source[0]["image"], bytes)
  assert raw.source[0]["image"].dtype == np.uint8
  differ = {"name", "encoding"}
  assert all(
    (png.metadata[key] == raw.metadata[key]) == (key not in differ)
    for key in png.metadata
  )
  assert png.image_shape == raw.image_shape == (12, 12, 3)
  assert png.num_classes == raw.num_classes == 2


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_threads": 1, "prefetch": 1},
    {"num_threads": 6},
    {"start_index": 32},
    {"num_shards": 2, "shard_index": 1},
  ],
  ids=str,
)
def test_batches_are_identical(both, options):
  _assert_equal(
    _batches(both["raw"], **options),
    _batches(both["png"], **options | {"num_threads": 2}),
  )


def test_a_run_goes_on_in_the_other_encoding(both):
  undisturbed = _batches(both["png"])
  resumed = _batches(both["raw"], 9, start_index=3 * 8)
  _assert_equal(resumed, undisturbed[3:])


def test_batches_are_the_callers_own(both):
  """Writing into a batch spoils neither the data set nor a later batch."""
  (first, *_) = _batches(both["raw"], 1)
  first["image"][:] = 0
  _assert_equal(_batches(both["raw"]), _batches(both["png"]))


def test_one_record_is_read_without_a_pool_of_threads(both, monkeypatch):
  from array_record.python import array_record_data_source

  def refuse(**_):
    raise AssertionError("a pool of threads for one record")

  monkeypatch.setattr(array_record_data_source, "_run_in_parallel", refuse)
  assert len(_batches(both["raw"], 2)) == 2


class _Plain(digits.Digits, skip_registration=True):
  """The digits as numbers in lists, as TFDS stores a tensor by default."""

  def _info(self):
    features = dict(super()._info().features)
    features["image"] = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )


def test_what_others_stored_otherwise_is_read_by_tfds(tmp_path):
  _prepare_digits(tmp_path / "ours")
  recipe = digits.recipe() | {"make_builder": lambda d: _Plain(data_dir=d)}
  preparation.prepare(**recipe, data_dir=str(tmp_path / "plain"))
  ours, plain = (
    pipeline.open_dataset("digits", str(tmp_path / name))
    for name in ("ours", "plain")
  )
  assert ours.metadata["content_hash"] == plain.metadata["content_hash"]
  _assert_equal(_batches(plain), _batches(ours))


def test_tfds_reads_the_same_pixels_from_both(both):
  pixels = {}
  for encoding, dataset in both.items():
    builder = tfds.builder_from_directory(dataset.directory)
    source = builder.as_data_source("train")
    pixels[encoding] = {r["id"]: r["image"] for r in source}
  assert list(pixels["png"]) == list(pixels["raw"])  # in one order
  for name, image in pixels["png"].items():
    np.testing.assert_array_equal(image, pixels["raw"][name])


@pytest.mark.parametrize(
  "side, asked, encoding",
  [
    (64, None, "raw"),
    (65, None, "png"),
    (64, "png", "png"),
    (65, "raw", "raw"),
  ],
)
def test_small_images_are_stored_as_pixels_unless_asked(
  tmp_path, write_images, side, asked, encoding
):
  source = write_images(tmp_path / "source", ["a.png", "b.png"])
  recipe = image_folder.recipe(str(source), resolution=side, encoding=asked)
  directory = preparation.prepare(**recipe, data_dir=str(tmp_path))
  assert dataset_lib.read_metadata(directory)["encoding"] == encoding
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.encoding == encoding


def _prepare_digits(data_dir, **options):
  overwrite = options.pop("overwrite", False)
  return preparation.prepare(
    **digits.recipe(**options), data_dir=str(data_dir), overwrite=overwrite
  )


def test_a_set_that_is_there_is_not_stored_anew_unasked(tmp_path):
  directory = _prepare_digits(tmp_path, encoding="png")
  file = directory / "prepared.json"
  metadata = json.loads(file.read_text())
  del metadata["encoding"]  # as before there was a choice
  file.write_text(json.dumps(metadata))
  assert _prepare_digits(tmp_path) == directory
  assert _prepare_digits(tmp_path, encoding="png") == directory
  pattern = "the same images with --encoding=png; .* --overwrite to store them"
  with pytest.raises(UserError, match=pattern):
    _prepare_digits(tmp_path, encoding="raw")
  before = _batches(pipeline.open_dataset("digits", str(tmp_path)), 4)
  _prepare_digits(tmp_path, overwrite=True)
  after = pipeline.open_dataset("digits", str(tmp_path))
  assert after.encoding == "raw"
  assert after.metadata["content_hash"] == metadata["content_hash"]
  _assert_equal(_batches(after, 4), before)


def test_pixels_that_are_no_bytes_are_refused(tmp_path):
  """As in a data set of others whose "image" is an array of floats."""
  file = _prepare_digits(tmp_path) / "features.json"
  text = file.read_text()
  assert text.count('"uint8"') == 1
  file.write_text(text.replace('"uint8"', '"float32"'))
  with pytest.raises(UserError, match="has no images of one size"):
    pipeline.open_dataset("digits", str(tmp_path))
