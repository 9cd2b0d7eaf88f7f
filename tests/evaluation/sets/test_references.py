"""Files of statistics: written, read by others' rules, checked, refused."""

import json
import os
import re
import resource
import tracemalloc
import zipfile

import numpy as np
from PIL import Image
import pytest

from diffit_jax import npz
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import reference_file, references

N, SIDE, D, E = 6, 8, 5, 3  # images, their side, pool and spatial features
ABOUT = {
  "extractor": {"name": "inception", "sha256": "0a1b", "resize": "tf1"},
  "num": 50_000,
  "source": {"kind": "dataset", "split": "train"},
}


def _statistics(dim: int, seed: int = 0):
  x = np.random.default_rng(seed).normal(size=(20, dim)) + 3
  return x.mean(0), np.cov(x, rowvar=False)


POOL, SPATIAL = _statistics(D), _statistics(E, 1)
PIXELS = np.random.default_rng(2).integers(0, 256, (N, SIDE, SIDE, 3), np.uint8)
ADM = {
  "mu": POOL[0],
  "sigma": POOL[1],
  "mu_s": SPATIAL[0],
  "sigma_s": SPATIAL[1],
  "arr_0": PIXELS,
}


def _write(path, **changes):
  options = {
    "pool": POOL,
    "spatial": SPATIAL,
    "images": iter([PIXELS[:4], PIXELS[4:]]),
    "num_images": N,
    "shape": (SIDE, SIDE),
    "about": ABOUT,
  }
  reference_file.write_reference(path, **(options | changes))
  return path


def _save(path, **arrays):
  np.savez(path, **arrays)
  return str(path)


def test_a_round_trip_bit_for_bit(tmp_path):
  found = references.read_reference(_write(tmp_path / "new" / "ref.npz"))
  for ours, theirs in zip(found.pool + found.spatial, POOL + SPATIAL):
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_array_equal(found.images.read(np.arange(N)), PIXELS)
  assert found.num == 50_000
  assert found.missing == {}
  assert found.card_entry["kind"] == "adm"
  assert found.card_entry["extractor"] == ABOUT["extractor"]
  assert found.card_entry["file"] == ABOUT
  assert found.card_entry["sha256"] == found.images.card_entry["sha256"]
  json.dumps(found.card_entry)
  again = _write(tmp_path / "again.npz")
  assert again.read_bytes() == (tmp_path / "new" / "ref.npz").read_bytes()
  assert os.listdir(tmp_path / "new") == ["ref.npz"]


def test_others_can_read_what_we_write(tmp_path):
  """By name with numpy; arr_0 row by row behind a header of version 1."""
  path = _write(tmp_path / "ref.npz")
  with np.load(path, allow_pickle=False) as file:
    assert set(file.files) == {*ADM, "about"}
    for name, array in ADM.items():
      np.testing.assert_array_equal(file[name], array)
      assert file[name].dtype == array.dtype
    assert json.loads(str(file["about"])) == ABOUT
  with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
    kinds = {info.compress_type for info in archive.infolist()}
    assert kinds == {zipfile.ZIP_STORED}
    for name in archive.namelist():
      with archive.open(name) as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        header = np.lib.format.read_array_header_1_0(file)
        if name == "arr_0.npy":
          assert header == (PIXELS.shape, False, np.uint8)
          rows = [file.read(PIXELS[0].nbytes) for _ in range(N)]
          assert b"".join(rows) == PIXELS.tobytes()
          assert not file.read()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8"])
def test_files_of_others(tmp_path, save, dtype):
  save(tmp_path / "x.npz", **ADM | {"sigma": POOL[1].astype(dtype)})
  found = references.read_reference(tmp_path / "x.npz")
  assert found.pool[1].dtype == np.dtype("float64")
  np.testing.assert_array_equal(found.pool[1], POOL[1].astype(dtype))
  np.testing.assert_array_equal(found.spatial[1], SPATIAL[1])
  np.testing.assert_array_equal(found.images.read(np.arange(N)), PIXELS)
  assert (found.num, found.missing) == (None, {})
  assert "extractor" not in found.card_entry


def test_a_file_of_mean_and_covariance_alone(tmp_path):
  where = _save(tmp_path / "x.npz", mu=POOL[0], sigma=POOL[1])
  found = references.read_reference(where)
  assert (found.spatial, found.images) == (None, None)
  assert found.card_entry["kind"] == "edm"
  assert found.missing == {
    "spatial": f"{where} holds no spatial statistics (mu_s, sigma_s)",
    "rows": f"{where} holds no images (arr_0)",
  }


def test_a_file_without_one_of_its_parts(tmp_path):
  some = {name: ADM[name] for name in ("mu", "sigma", "arr_0")}
  found = references.read_reference(_save(tmp_path / "a.npz", **some))
  assert (list(found.missing), found.card_entry["kind"]) == (["spatial"], "adm")
  some = {name: ADM[name] for name in ADM if name != "arr_0"}
  found = references.read_reference(_save(tmp_path / "b.npz", **some))
  assert list(found.missing) == ["rows"]
  assert found.card_entry["kind"] == "adm"


def test_images_are_references_too(tmp_path, data_dir):
  folder = tmp_path / "folder"
  folder.mkdir()
  for i, image in enumerate(PIXELS):
    Image.fromarray(image).save(folder / f"{i}.png")
  npz_file = _save(tmp_path / "x.npz", arr_0=PIXELS)
  for where, container in (
    (folder, "folder"),
    (npz_file, "npz"),
    (PIXELS, "array"),
  ):
    found = references.read_reference(where)
    assert (found.pool, found.spatial, found.missing) == (None, None, {})
    np.testing.assert_array_equal(found.images.read(np.arange(N)), PIXELS)
    assert found.num == N
    assert found.card_entry["kind"] == "images"
    assert found.card_entry["container"] == container
  found = references.read_reference("digits", data_dir, "train[:50]")
  assert (found.num, found.card_entry["container"]) == (50, "dataset")


def test_spatial_statistics_without_the_others_are_not_used(tmp_path):
  """As in ADM's rule: without mu, all statistics come from arr_0."""
  some = {name: ADM[name] for name in ("mu_s", "sigma_s", "arr_0")}
  found = references.read_reference(_save(tmp_path / "x.npz", **some))
  assert (found.pool, found.spatial) == (None, None)
  assert found.card_entry["kind"] == "images"


_NAN = POOL[1].copy()
_NAN[0, 0] = np.nan
_ASKEW = POOL[1].copy()
_ASKEW[0, 1] += 2e-5 * np.abs(POOL[1]).max()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"mu": POOL[0][:3]}, r"shapes \[3\] and \[5, 5\], which are not \[d\]"),
    ({"mu": POOL[0][None]}, r"shapes \[1, 5\] and \[5, 5\]"),
    ({"sigma": POOL[1][:4]}, r"shapes \[5\] and \[4, 5\]"),
    ({"sigma_s": SPATIAL[0]}, r"mu_s and sigma_s .*\[3\] and \[3\]"),
    ({"mu": POOL[0][:0], "sigma": POOL[1][:0, :0]}, r"shapes \[0\]"),
    ({"sigma": _NAN}, r"\[5\] and \[5, 5\], are not finite"),
    ({"mu": np.full(D, np.inf)}, "are not finite"),
    ({"sigma": _ASKEW}, r"sigma of .*\[5, 5\], is not symmetric"),
    ({"mu": np.arange(5)}, "are int64 and float64, and float32 or float64"),
    ({"sigma": POOL[1].astype(np.float16)}, "float64 and float16"),
    ({"mu": np.array([{}] * 5)}, "holds Python objects"),
    ({"arr_0": PIXELS / 255.0}, "holds float64 images, from 0 to 1"),
  ],
)
def test_statistics_that_are_none(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    references.read_reference(_save(tmp_path / "x.npz", **ADM | changes))


def test_rounding_to_float32_is_no_asymmetry(tmp_path):
  nearly = POOL[1].copy()
  nearly[0, 1] += 5e-6 * np.abs(nearly).max()
  where = _save(tmp_path / "x.npz", **ADM | {"sigma": nearly})
  found = references.read_reference(where)
  np.testing.assert_array_equal(found.pool[1], nearly)


def test_half_of_the_statistics(tmp_path):
  for name, other in (("mu", "sigma"), ("sigma", "mu")):
    where = _save(tmp_path / "x.npz", **{name: ADM[name], "arr_0": PIXELS})
    with pytest.raises(UserError, match=f"holds {name} and no {other}:"):
      references.read_reference(where)
  some = {name: ADM[name] for name in ("mu", "sigma", "sigma_s")}
  with pytest.raises(UserError, match="holds sigma_s and no mu_s:"):
    references.read_reference(_save(tmp_path / "x.npz", **some))


def test_dimensions_of_another_extractor(tmp_path):
  found = references.read_reference(_write(tmp_path / "x.npz"))
  references.check_dims(found, {"pool": D, "spatial": E})
  references.check_dims(found, {"pool": D})
  with pytest.raises(UserError, match="x.npz holds statistics of 5 pool feat"):
    references.check_dims(found, {"pool": 2048, "spatial": E})
  with pytest.raises(UserError, match="of 3 spatial .* extractor gives 2023"):
    references.check_dims(found, {"pool": D, "spatial": 2023})
  references.check_dims(references.read_reference(PIXELS), {"pool": 2048})


def test_another_resolution(tmp_path):
  found = references.read_reference(_write(tmp_path / "x.npz"))
  references.check_resolution(found, (SIDE, SIDE))
  message = re.escape("are 16x8 (height x width), the reference")
  with pytest.raises(UserError, match=f"{message} .*x.npz is of 8x8"):
    references.check_resolution(found, (16, 8))
  where = _save(tmp_path / "edm.npz", mu=POOL[0], sigma=POOL[1])
  references.check_resolution(references.read_reference(where), (16, 16))


def test_another_extractor(tmp_path):
  extractor = ABOUT["extractor"]
  found = references.read_reference(_write(tmp_path / "x.npz"))
  references.check_extractor(found, extractor | {"dtype": "float32"})
  with pytest.raises(UserError, match="resize is 'tf1' there and 'pyt"):
    references.check_extractor(found, extractor | {"resize": "pytorch_fid"})
  with pytest.raises(UserError, match="x.npz.*sha256 is '0a1b' there and 'ff'"):
    references.check_extractor(found, extractor | {"sha256": "ff"})
  where = _save(tmp_path / "adm.npz", **ADM)
  references.check_extractor(references.read_reference(where), {"sha256": "ff"})


@pytest.mark.parametrize(
  "about", [np.array("{"), np.array("[1]"), np.array(["{}"]), np.float64(1)]
)
def test_a_member_about_of_others_is_passed_over(tmp_path, about):
  where = _save(tmp_path / "x.npz", **ADM, about=about)
  found = references.read_reference(where)
  assert found.num is None
  assert "file" not in found.card_entry


def test_no_damage_goes_unseen(tmp_path):
  path = _write(tmp_path / "x.npz", images=iter([PIXELS[:1]]), num_images=1)
  whole = path.read_bytes()
  for cut in range(0, len(whole), 5):
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"x\.npz is damaged or no"):
      references.read_reference(path)
  for position in range(0, len(whole), 5):
    changed = bytearray(whole)
    changed[position] ^= 0x55
    path.write_bytes(changed)
    try:
      found = references.read_reference(path)
    except UserError:
      continue
    if found.pool is not None:  # unseen: dates and the like, or a member's name
      np.testing.assert_array_equal(found.pool[1], POOL[1])
    if found.images is not None:
      np.testing.assert_array_equal(found.images.read([0]), PIXELS[:1])


def _too_few():
  yield PIXELS[:4]


def _breaks():
  yield PIXELS[:4]
  raise UserError("an image cannot be read")


@pytest.mark.parametrize(
  ("images", "error", "message"),
  [
    (_too_few(), ValueError, "have 4 rows, the array 6"),
    (iter([PIXELS, PIXELS]), ValueError, "ends at row 12"),
    (iter([PIXELS[:, :4]]), ValueError, "a block of uint8"),
    (iter([PIXELS / 1.0]), ValueError, "a block of float64"),
    (_breaks(), UserError, "^an image cannot be read"),
  ],
)
def test_a_file_that_was_not_finished_is_not_there(
  tmp_path, images, error, message
):
  path = tmp_path / "x.npz"
  path.write_text("the former one")
  with pytest.raises(error, match=message):
    _write(path, images=images)
  assert path.read_text() == "the former one"
  assert os.listdir(tmp_path) == ["x.npz"]


def test_what_is_not_written(tmp_path):
  with pytest.raises(UserError, match="ref.zip: a file of statistics must end"):
    reference_file.require_npz(tmp_path / "ref.zip")
  with pytest.raises(UserError, match="sigma of the features.*not symmetric"):
    _write(tmp_path / "x.npz", pool=(POOL[0], _ASKEW))
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write .*x.npz"):
    _write(tmp_path / "file" / "x.npz")
  assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("room", [100, 1500, 2500, 100_000])
def test_a_full_disk(tmp_path, room):
  """A limit on the size of files ends writing as a full disk does."""
  blocks = (PIXELS for _ in range(1000))
  former = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (room, former[1]))
  try:
    with pytest.raises(UserError, match="cannot write .*x.npz .* is left"):
      _write(tmp_path / "x.npz", images=blocks, num_images=1000 * N)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
  assert not os.listdir(tmp_path)


def test_images_are_streamed(tmp_path):
  """96 MB of images go through 8 MB."""
  blocks = (np.full((4, 256, 256, 3), i, np.uint8) for i in range(128))
  tracemalloc.start()
  try:
    _write(tmp_path / "x.npz", images=blocks, num_images=512, shape=(256, 256))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
  finally:
    tracemalloc.stop()
  with np.load(tmp_path / "x.npz", mmap_mode=None) as file:
    assert (
      file["arr_0"][:, 0, 0, 0].tolist()
      == np.repeat(np.arange(128), 4).tolist()
    )


def test_without_spatial_statistics(tmp_path):
  found = references.read_reference(_write(tmp_path / "x.npz", spatial=None))
  assert list(found.missing) == ["spatial"]


def test_the_subset():
  assert reference_file.choose_subset(5).tolist() == [0, 1, 2, 3, 4]
  assert len(reference_file.choose_subset(10_000)) == 10_000
  index = reference_file.choose_subset(50_000)
  assert len(index) == 10_000
  assert (np.diff(index) > 0).all()
  assert 0 <= index[0] < index[-1] < 50_000
  np.testing.assert_array_equal(index, reference_file.choose_subset(50_000))
  other = reference_file.choose_subset(50_000, seed=1)
  # Two draws of a fifth share a fifth of their members, 2000 +- 36.
  assert abs(len(np.intersect1d(index, other)) - 2000) < 200
  # The mean index is uniform's: 25,000 +- 14,434 / sqrt(10,000) * 0.9.
  assert abs(index.mean() - 25_000) < 5 * 130


def test_equal_arrays_make_equal_files(tmp_path):
  for name in ("a", "b"):
    npz.write_npz(tmp_path / name, {"x": POOL[0], "y": POOL[1].T})
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  with np.load(tmp_path / "a", allow_pickle=False) as file:
    np.testing.assert_array_equal(file["y"], POOL[1].T)
  with pytest.raises(ValueError):
    npz.write_npz(tmp_path / "c", {"x": np.array([{}])})
  assert sorted(os.listdir(tmp_path)) == ["a", "b"]
