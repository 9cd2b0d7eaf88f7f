"""What `prepare` makes, what it refuses, and what it leaves behind."""

import errno
import importlib.util
import io
import json
import resource
import tarfile
import zipfile

from absl import logging
import numpy as np
from PIL import Image, PngImagePlugin
import pytest
import tensorflow_datasets as tfds

from diffit_jax.data import classes, pipeline, preparation, transforms
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data.builders import cifar10, digits, ffhq64, image_folder
from diffit_jax.errors import UserError


def _prepare(recipe, data_dir, **options):
  return preparation.prepare(**recipe, data_dir=str(data_dir), **options)


def _records(name, data_dir, split="train"):
  """{id: (pixels, label)} by TFDS's own reader, in the order of the records."""
  directory = dataset_lib.find_directory(name, str(data_dir))
  source = tfds.builder_from_directory(str(directory)).as_data_source(split)
  return {
    record["id"].decode(): (record["image"], record.get("label"))
    for record in source
  }


def _tree(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_of_any_images_becomes_what_pillow_makes(
  tmp_path, write_images
):
  names = ["cat/1.PNG", "cat/2.jpg", "dog/3.webp", "dog/4.JPEG"]
  source = write_images(tmp_path / "source", names, size=(20, 13))
  recipe = image_folder.recipe(str(source), name="pets", resolution=6)
  directory = _prepare(recipe, tmp_path)
  assert directory == tmp_path / "pets" / "1.0.0"
  records = _records("pets", tmp_path)
  assert sorted(records) == names
  for name, (image, label) in records.items():
    rgb = Image.open(source / name).convert("RGB")
    middle = rgb.crop((3, 0, 16, 13))  # 13 of 20 columns
    expected = middle.resize((6, 6), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(image, np.asarray(expected))
    assert label == (0 if name.startswith("cat") else 1)
  metadata = pipeline.open_dataset("pets", str(tmp_path)).metadata
  assert metadata["num_images"] == 4
  assert metadata["image_shape"] == [6, 6, 3]
  assert metadata["class_names"] == ["cat", "dog"]
  assert metadata["settings"]["crop"] == "center-crop"
  assert metadata["source"] == str(source)


def test_a_zip_equals_the_folder_it_was_made_from(tmp_path, write_images):
  names = [f"00000/img{i:08d}.png" for i in range(12)]
  source = write_images(tmp_path / "source", names)
  labels = {"labels": [[name, i % 3] for i, name in enumerate(names)]}
  (source / "dataset.json").write_text(json.dumps(labels))
  with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
    for name in reversed([*names, "dataset.json"]):
      archive.write(source / name, name)
  hashes, orders = [], []
  for name, path in [("folder", source), ("zip", tmp_path / "source.zip")]:
    recipe = image_folder.recipe(str(path), name=name, resolution=8, crop="adm")
    _prepare(recipe, tmp_path)
    dataset = pipeline.open_dataset(name, str(tmp_path))
    assert dataset.num_classes == 3
    hashes.append(dataset.metadata["content_hash"])
    records = _records(name, tmp_path)
    orders.append(list(records))
    for index, each in enumerate(names):
      assert records[each][1] == index % 3
  assert hashes[0] == hashes[1]
  assert orders[0] == orders[1] != sorted(orders[0])


def test_the_content_hash_sees_a_single_pixel(tmp_path, write_images):
  source = write_images(tmp_path / "source", ["a.png", "b.png"], size=(8, 8))
  recipe = image_folder.recipe(str(source), resolution=8)
  hashes = []
  for _ in range(2):
    directory = _prepare(recipe, tmp_path, overwrite=True)
    hashes.append(dataset_lib.read_metadata(directory)["content_hash"])
    with Image.open(source / "a.png") as image:
      pixels = np.array(image)
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(source / "a.png")
  assert hashes[0] != hashes[1]


def test_ffhq64_resizes_by_lanczos_and_leaves_64_alone(tmp_path, write_images):
  source = write_images(tmp_path / "source", ["00000/a.png"], size=(128, 128))
  write_images(source, ["01000/b.png"], size=(64, 64))
  _prepare(ffhq64.recipe(str(source)), tmp_path)
  records = _records("ffhq64", tmp_path)
  a, b = (Image.open(source / name) for name in ("00000/a.png", "01000/b.png"))
  expected = a.resize((64, 64), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(records["00000/a.png"][0], np.asarray(expected))
  np.testing.assert_array_equal(records["01000/b.png"][0], np.asarray(b))
  # FFHQ's folders are no classes.
  assert pipeline.open_dataset("ffhq64", str(tmp_path)).num_classes == 0


def _with_bad_files(folder, write_images, num_good, num_bad):
  folder.mkdir()
  write_images(folder, [f"{i:03d}.png" for i in range(num_good)], size=(4, 4))
  for i in range(num_bad):
    (folder / f"bad{i}.png").write_bytes(b"damaged")
  return str(folder)


def test_unreadable_files_are_named_skipped_and_counted(
  tmp_path, write_images, caplog
):
  source = _with_bad_files(tmp_path / "source", write_images, 99, 1)
  with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
    _prepare(image_folder.recipe(source, resolution=4), tmp_path)
  assert "cannot read bad0.png, skipped: no PNG, JPEG or WebP" in caplog.text
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == 99
  assert dataset.metadata["num_skipped"] == 1
  assert dataset.metadata["skipped"] == ["bad0.png"]


def test_too_many_unreadable_files_are_an_error_unless_allowed(
  tmp_path, write_images
):
  source = _with_bad_files(tmp_path / "source", write_images, 20, 2)
  with pytest.raises(UserError, match=r"of the 22 files .*bad0.png.*=0.01 all"):
    _prepare(image_folder.recipe(source, resolution=4), tmp_path)
  assert not (tmp_path / "image_folder").exists()
  recipe = image_folder.recipe(source, resolution=4, max_bad_fraction=0.1)
  _prepare(recipe, tmp_path)
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == 20


def test_a_source_without_a_readable_image_is_an_error(tmp_path, write_images):
  source = _with_bad_files(tmp_path / "source", write_images, 0, 3)
  recipe = image_folder.recipe(source, resolution=4, max_bad_fraction=1.0)
  with pytest.raises(UserError, match="no image of .* could be read"):
    _prepare(recipe, tmp_path)


def test_the_user_hears_of_enlarged_and_stretched_images(
  tmp_path, write_images, caplog
):
  source = write_images(tmp_path / "source", ["a.png", "b.png"], size=(9, 5))
  recipe = image_folder.recipe(str(source), resolution=8, crop="edm")
  with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
    _prepare(recipe, tmp_path)
  assert "2 of 2 images are smaller than 8 and were enlarged" in caplog.text
  assert "2 of 2 images are not square and were stretched" in caplog.text


def test_a_set_that_is_there_stays_unless_the_settings_differ(
  tmp_path, write_images
):
  source = write_images(tmp_path / "source", ["a.png", "b.png"])
  recipe = lambda **kw: image_folder.recipe(str(source), resolution=4, **kw)
  directory = _prepare(recipe(), tmp_path)
  before = (directory / "prepared.json").stat().st_ino
  assert _prepare(recipe(), tmp_path) == directory
  assert (directory / "prepared.json").stat().st_ino == before
  with pytest.raises(UserError, match="crop is 'center-crop' there and 'adm'"):
    _prepare(recipe(crop="adm"), tmp_path)
  records = next(directory.glob("*.array_record*"))
  content = records.read_bytes()
  records.write_bytes(b"")
  with pytest.raises(UserError, match="is missing or empty.*--overwrite"):
    _prepare(recipe(), tmp_path)
  records.write_bytes(content)
  write_images(source, ["c.png"])
  with pytest.raises(UserError, match="source_listing is .* --overwrite"):
    _prepare(recipe(), tmp_path)
  assert (directory / "prepared.json").stat().st_ino == before
  _prepare(recipe(), tmp_path, overwrite=True)
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == 3
  assert _tree(tmp_path / "image_folder")[0] == "1.0.0"


def test_a_set_that_is_there_is_looked_for_before_anything_is_written(
  tmp_path, monkeypatch
):
  directory = _prepare(digits.recipe(), tmp_path)

  def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(preparation, "lock", refuse)
  assert _prepare(digits.recipe(), tmp_path) == directory
  (directory.parent / "incomplete.abc").mkdir()  # left by a killed prepare
  assert _prepare(digits.recipe(), tmp_path) == directory
  with pytest.raises(UserError, match="cannot make .* Read-only file system"):
    _prepare(digits.recipe(), tmp_path, overwrite=True)


def test_the_images_of_each_class_are_counted(tmp_path, write_images):
  names = ["cat/0.png", "dog/0.png", "dog/1.png", "dog/2.png"]
  source = write_images(tmp_path / "source", names)
  pairs = [["cat/0.png", 3], *([name, 1] for name in names[1:])]
  (source / "dataset.json").write_text(json.dumps({"labels": pairs}))
  directory = _prepare(image_folder.recipe(str(source), resolution=4), tmp_path)
  metadata = json.loads((directory / "prepared.json").read_text())
  assert metadata["images_per_class"] == [0, 3, 0, 1]
  assert classes.in_words(metadata) == (
    "4 classes: 0 = 0 (0), 1 = 1 (3), 2 = 2 (0), 3 = 3 (1);"
    " 2 of them without images"
  )
  many = {
    "class_names": [f"n{i:04d}" for i in range(1000)],
    "images_per_class": [732, *[1300] * 999],
  }
  assert classes.in_words(many) == (
    "1000 classes: 0 = n0000 (732), 1 = n0001 (1300), 2 = n0002 (1300), ...,"
    " 999 = n0999 (1300); 732 to 1300 images in each"
  )
  before = {"class_names": ["a", "b"]}  # sets made without counting
  assert classes.in_words(before) == "2 classes: 0 = a, 1 = b"


def test_images_with_damaged_metadata_stay_and_moving_ones_are_told(
  tmp_path, write_images, caplog
):
  source = write_images(tmp_path / "source", ["a.png", "b.png"])
  image = Image.open(source / "a.png")
  text = PngImagePlugin.PngInfo()
  text.add_text("Raw profile type exif", "\nexif\n 10\nno hex")
  image.save(source / "a.png", pnginfo=text)
  image.save(
    source / "c.webp", save_all=True, append_images=[image.rotate(90)],
    lossless=True,
  )  # fmt: skip
  with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
    _prepare(image_folder.recipe(str(source), resolution=12), tmp_path)
  assert "1 of 3 images have metadata that cannot be read" in caplog.text
  assert "1 of 3 images hold several frames, of which the first" in caplog.text
  records = _records("image_folder", tmp_path)
  for name in ("a.png", "c.webp"):
    np.testing.assert_array_equal(records[name][0], np.asarray(image))


def test_a_set_made_by_others_is_not_touched(tmp_path):
  directory = _prepare(digits.recipe(), tmp_path)
  (directory / "prepared.json").unlink()
  with pytest.raises(UserError, match="was not made by this program"):
    _prepare(digits.recipe(), tmp_path)
  _prepare(digits.recipe(), tmp_path, overwrite=True)
  assert (directory / "prepared.json").exists()


def test_a_failed_overwrite_keeps_the_former_set(tmp_path, write_images):
  source = write_images(tmp_path / "source", ["a.png", "b.png"])
  _prepare(image_folder.recipe(str(source), resolution=4), tmp_path)
  before = _tree(tmp_path / "image_folder")
  (source / "c.png").write_bytes(b"damaged")
  with pytest.raises(UserError, match="cannot be read"):
    recipe = image_folder.recipe(str(source), resolution=4)
    _prepare(recipe, tmp_path, overwrite=True)
  assert _tree(tmp_path / "image_folder") == before
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == 2


def test_two_at_once_are_kept_apart(tmp_path):
  recipe = digits.recipe()
  make_builder = recipe["make_builder"]

  def meddle(folder):
    with pytest.raises(UserError, match="another prepare is making"):
      _prepare(digits.recipe(), tmp_path)
    return make_builder(folder)

  directory = _prepare(recipe | {"make_builder": meddle}, tmp_path)
  assert _tree(tmp_path / "digits")[0] == "1.0.0"
  assert (directory / "prepared.json").exists()


def test_leftovers_of_a_killed_prepare_are_removed(tmp_path):
  stale = tmp_path / "digits" / "incomplete.abc" / "digits"
  stale.mkdir(parents=True)
  (stale / "bucket.tmp").write_bytes(b"x")
  (tmp_path / "digits" / "1.0.0").mkdir()  # a half-made set of another tool
  _prepare(digits.recipe(), tmp_path)
  assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
  assert pipeline.open_dataset("digits", str(tmp_path)).num_images == 1797


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(UserError, match="cannot make the data set .*file/digits"):
    _prepare(digits.recipe(), tmp_path / "file")


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes per file
  try:
    with pytest.raises(UserError, match="cannot make the data set .*too large"):
      _prepare(digits.recipe(), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_cifar10_by_tfds_from_its_genuine_layout(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  archive = tmp_path / "cifar-10-binary.tar.gz"
  expected, labels = [], []
  with tarfile.open(archive, "w:gz") as tar:

    def add(name, data):
      member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))

    add("batches.meta.txt", "\n".join(map(str, range(10))).encode() + b"\n\n")
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
      # A record is one byte of label, then the red, green and blue planes.
      rows = rng.integers(0, 256, (2, 3073), dtype=np.uint8)
      rows[:, 0] %= 10
      add(f"{name}.bin", rows.tobytes())
      expected += list(rows[:, 1:].reshape(2, 3, 32, 32).transpose(0, 2, 3, 1))
      labels += rows[:, 0].tolist()
  recipe = cifar10.recipe(source=str(archive))
  # It is not the published file, and TFDS says so ...
  with pytest.raises(UserError, match="cannot make .* has wrong checksum"):
    _prepare(recipe, tmp_path)
  assert not (tmp_path / "cifar10").exists()
  # ... therefore the test looks away there, and nowhere else.
  monkeypatch.setattr(
    tfds.download.DownloadManager,
    "_register_or_validate_checksums",
    lambda *_, **__: None,
  )
  _prepare(recipe, tmp_path)
  dataset = pipeline.open_dataset("cifar10", str(tmp_path))
  assert dataset.image_shape == (32, 32, 3)
  assert (dataset.num_images, dataset.num_classes) == (10, 10)
  records = _records("cifar10", tmp_path)
  for index in range(10):
    image, label = records[f"train_{index:05d}"]
    np.testing.assert_array_equal(image, expected[index])
    assert label == labels[index]
  images = [transforms.decode(r["image"], 3) for r in dataset.source]
  assert {i.tobytes() for i in images} == {i.tobytes() for i in expected[:10]}


def test_cifar10_without_tensorflow_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(UserError, match=r"needs TensorFlow: pip install .*pre"):
    cifar10.recipe()


def test_cifar10_wants_the_archive_by_its_name(tmp_path):
  with pytest.raises(UserError, match="takes --source=.../cifar-10-binary"):
    cifar10.recipe(source="cifar-10-python.tar.gz")
  with pytest.raises(UserError, match="does not exist"):
    cifar10.recipe(source=f"{tmp_path}/cifar-10-binary.tar.gz")
