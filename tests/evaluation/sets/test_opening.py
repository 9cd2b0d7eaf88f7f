"""Images to be scored: the same pixels from every source, and refusals."""

from concurrent import futures
import dataclasses
import io
import json
import shutil
import tracemalloc
import zipfile

from absl import logging
import numpy as np
from PIL import Image
import pytest

from diffit_jax import npz
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.data import preparation
from diffit_jax.data.builders import image_folder
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets import image_files, opening
from diffit_jax.evaluation.sets.guard import Guard
from diffit_jax.generation import output

N, SIDE = 12, 8
LABELS = np.arange(N) % 3


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


PIXELS = _noise(N, SIDE, SIDE, 3)


def _write_folder(folder, pixels, name=lambda i: f"{i:06d}.png"):
  for i, image in enumerate(pixels):
    path = folder / name(i)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.squeeze()).save(path)
  return folder


def _zip_folder(folder, path, labels=None):
  with zipfile.ZipFile(path, "w") as archive:
    for file in sorted(folder.rglob("*.png")):
      archive.write(file, file.relative_to(folder).as_posix())
    if labels is not None:
      archive.writestr("dataset.json", json.dumps({"labels": labels}))
  return path


def _in_class(i: int) -> str:
  return f"class{LABELS[i]}/{i:06d}.png"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """{kind: where the same images and labels are}; "dir" holds data sets."""
  root = tmp_path_factory.mktemp("places")
  folder = _write_folder(root / "folder", PIXELS, _in_class)
  names = [[_in_class(i), int(LABELS[i])] for i in range(N)]
  np.savez(root / "stored.npz", PIXELS, LABELS)
  np.savez_compressed(root / "small.npz", PIXELS, LABELS)
  np.savez(root / "fortran.npz", np.asfortranarray(PIXELS), LABELS)
  for encoding in ("png", "raw"):
    recipe = image_folder.recipe(
      str(folder), name=encoding, resolution=SIDE, encoding=encoding
    )
    preparation.prepare(**recipe, data_dir=str(root / "data"))
  return {
    "array": PIXELS,
    "stored": root / "stored.npz",
    "compressed": root / "small.npz",
    "fortran": root / "fortran.npz",
    "folder": folder,
    "zip": _zip_folder(folder, root / "images.zip", names),
    "png": "png",
    "raw": "raw",
    "dir": str(root / "data"),
  }


def _sorted(pixels, labels):
  """Rows in order of their first pixels: sources number images as they like."""
  order = np.lexsort(pixels.reshape(len(pixels), -1)[:, :4].T)
  return pixels[order], labels[order]


@pytest.mark.parametrize(
  ("place", "kind"),
  [
    ("stored", "npz"),
    ("compressed", "npz"),
    ("fortran", "npz"),
    ("folder", "folder"),
    ("zip", "zip"),
    ("png", "dataset"),
    ("raw", "dataset"),
  ],
)
def test_every_source_gives_the_same_images(places, place, kind):
  found = opening.open_images(places[place], places["dir"])
  assert (found.num, found.shape) == (N, (SIDE, SIDE))
  pixels = found.read(np.arange(N))
  assert pixels.dtype == np.uint8
  assert found.labels.dtype == np.int64
  expected = _sorted(PIXELS, LABELS)
  for ours, theirs in zip(_sorted(pixels, found.labels), expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  if kind == "npz":  # in their own order
    np.testing.assert_array_equal(pixels, PIXELS)
  index = np.array([7, 0, 7, 11])  # any order, twice, more or fewer
  np.testing.assert_array_equal(found.read(index), pixels[index])
  assert found.read(index[:0]).shape == (0, SIDE, SIDE, 3)
  assert found.card_entry["source"] == str(places[place])
  assert (found.card_entry["kind"], found.card_entry["num"]) == (kind, N)
  json.dumps(found.card_entry)
  assert found.sampling == {}


def test_an_array_is_taken_as_it_is():
  found = opening.open_images(PIXELS)
  np.testing.assert_array_equal(found.read(np.array([3, 1])), PIXELS[[3, 1]])
  assert found.labels is None
  assert found.card_entry["kind"] == "array"
  changed = PIXELS.copy()
  changed[5, 4, 3, 2] ^= 1
  other = opening.open_images(changed)
  assert other.card_entry["sha256"] != found.card_entry["sha256"]


def test_what_is_read_is_ones_own(places):
  for place in ("array", "stored", "folder", "raw"):
    found = opening.open_images(places[place], places["dir"])
    before = found.read(np.arange(3))
    found.read(np.arange(3))[:] = 0
    np.testing.assert_array_equal(found.read(np.arange(3)), before)


def test_reading_from_many_threads(places):
  for place in ("zip", "png", "compressed"):
    found = opening.open_images(places[place], places["dir"])
    whole = found.read(np.arange(N))
    with futures.ThreadPoolExecutor(4) as pool:
      index = [np.roll(np.arange(N), i) for i in range(16)]
      for i, pixels in zip(index, pool.map(found.read, index), strict=True):
        np.testing.assert_array_equal(pixels, whole[i])


def test_gray_is_repeated(tmp_path):
  gray = PIXELS[..., :1]
  np.savez(tmp_path / "gray.npz", gray)
  folder = _write_folder(tmp_path / "gray", gray)
  for where in (gray, tmp_path / "gray.npz", folder):
    pixels = opening.open_images(where).read(np.arange(N))
    np.testing.assert_array_equal(pixels, np.repeat(gray, 3, axis=-1))


def test_gray_data_sets_are_repeated(data_dir):
  pixels = opening.open_images("digits", data_dir).read(np.arange(10))
  assert pixels.shape[-1] == 3
  np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
  assert pixels.max() > 1


def test_images_need_not_be_square(tmp_path):
  pixels = _noise(3, 4, 6, 3)
  folder = _write_folder(tmp_path / "wide", pixels)
  found = opening.open_images(folder)
  assert found.shape == (4, 6)
  np.testing.assert_array_equal(found.read(np.arange(3)), pixels)


def _sample(folder, labels=LABELS, num=N):
  """What `sample` leaves: images, a grid, an npz and its settings."""
  run = output.Output(folder, output.IMAGES, PIXELS.shape[1:])
  folder.mkdir()
  for i in range(num):
    run.write(i, PIXELS[i])
  (folder / "sampling.json").write_text('{"seed": 3, "ema": 0.5}')
  run.finish(num, labels)
  return folder


def test_a_folder_of_sample_is_its_images_with_the_labels_of_its_npz(tmp_path):
  folder = _sample(tmp_path / "run")
  npz_file = folder / f"samples_{N}x{SIDE}x{SIDE}x3.npz"
  for where in (folder, folder / "images", npz_file):
    found = opening.open_images(where)
    np.testing.assert_array_equal(found.read(np.arange(N)), PIXELS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.sampling == {"seed": 3, "ema": 0.5}


def test_images_of_sample_follow_their_numbers(tmp_path):
  """1000000.png comes behind 200000.png, though not in the alphabet."""
  run = tmp_path / "run"
  names = ("000007", "200000", "1000000")
  _write_folder(run / "images", PIXELS[:3], lambda i: f"{names[i]}.png")
  (run / "sampling.json").write_text("{}")
  found = opening.open_images(run)
  np.testing.assert_array_equal(found.read(np.arange(3)), PIXELS[:3])


def test_samples_without_labels_and_unfinished_samples(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: warnings.append(text)
  )
  folder = _sample(tmp_path / "run", labels=None)
  assert opening.open_images(folder).labels is None
  assert not warnings
  (folder / "images" / "000003.png").unlink()
  found = opening.open_images(folder)
  assert (found.num, found.labels) == (N - 1, None)
  assert "sampling is not finished" in warnings[-1]
  (folder / "sampling.json").write_text("{")
  assert opening.open_images(folder).sampling == {}
  assert "is damaged" in warnings[-1] or "is damaged" in warnings[-2]


def test_a_path_wins_over_a_data_set(places, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = opening.open_images("raw", places["dir"])
  assert found.card_entry["kind"] == "dataset"
  _write_folder(tmp_path / "raw", PIXELS[:2])
  found = opening.open_images("raw", places["dir"])
  assert (found.card_entry["kind"], found.num) == ("folder", 2)


def test_the_folder_of_a_data_set_is_the_data_set(places):
  where = f"{places['dir']}/raw"
  found = opening.open_images(where, split="train[:5]")
  assert (found.card_entry["kind"], found.num) == ("dataset", 5)
  assert found.card_entry["source"] == where


def test_a_data_set_of_latents_is_refused(places, monkeypatch):
  made = dataset_lib.open_dataset("raw", places["dir"])
  latent = dataclasses.replace(made, kind="latent")
  monkeypatch.setattr(opening.dataset_lib, "open_dataset", lambda *_: latent)
  with pytest.raises(UserError, match="raw/1.0.0 holds latents, no images"):
    opening.open_images("raw", places["dir"])


def test_the_hash_tells_sets_apart(places, tmp_path, monkeypatch):
  folder = tmp_path / "copy"
  shutil.copytree(places["folder"], folder)
  first = opening.open_images(places["folder"]).card_entry
  copy = opening.open_images(folder).card_entry
  zip_file = _zip_folder(folder, tmp_path / "z.zip")
  zipped = opening.open_images(zip_file).card_entry
  assert first["content_hash"] == copy["content_hash"] == zipped["content_hash"]
  file = folder / _in_class(4)
  data = bytearray(file.read_bytes())
  data[-1] ^= 1  # of the checksum of the last chunk, which Pillow passes over
  file.write_bytes(data)
  changed = opening.open_images(folder).card_entry
  assert changed["content_hash"] != first["content_hash"]
  monkeypatch.setattr(image_files, "_HASHED_BYTES", 10)
  large = opening.open_images(folder).card_entry
  assert "content_hash" not in large
  monkeypatch.undo()
  file.write_bytes(data + b"x")
  monkeypatch.setattr(image_files, "_HASHED_BYTES", 10)
  longer = opening.open_images(folder).card_entry
  assert longer["listing_hash"] != large["listing_hash"]


def _save(tmp_path, **arrays):
  np.savez(tmp_path / "x.npz", **arrays)
  return str(tmp_path / "x.npz")


@pytest.mark.parametrize(
  ("pixels", "message"),
  [
    (
      np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 4, 4, 3),
      r"float32 images, from -1 to 1: convert to uint8 first.*127\.5 \+ 128",
    ),
    (np.full((1, 4, 4, 3), np.nan), "float64 images, from nan to nan"),
    (PIXELS.astype(np.int64), "int64 images: convert to uint8"),
    (PIXELS[0], r"shape \[8, 8, 3\], and images are uint8 \[number"),
    (PIXELS[None], r"shape \[1, 12, 8, 8, 3\]"),
    (_noise(2, 4, 4, 4), r"\[2, 4, 4, 4\]: drop the fourth channel, alpha"),
    (_noise(2, 4, 4, 2), "images have 3 channels or 1, not 2"),
    (_noise(2, 3, 4, 4), "channels last"),
    (np.zeros((2, 8, 8, 4), np.float32), "latents, to be decoded"),
    (PIXELS[:0], r"holds no images, its shape being \[0, 8, 8, 3\]"),
  ],
)
def test_arrays_that_are_no_images(tmp_path, pixels, message):
  with pytest.raises(UserError, match=f"^the array.*{message}"):
    opening.open_images(pixels)
  where = _save(tmp_path, arr_0=pixels)
  with pytest.raises(UserError, match=rf"^arr_0 of .*x\.npz.*{message}"):
    opening.open_images(where)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({}, r"x\.npz is empty"),
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, "holds statistics.*no images"),
    ({"b": PIXELS, "a": PIXELS}, "holds no arr_0, where images are, but a, b"),
    ({"arr_0": PIXELS, "arr_1": LABELS[:3]}, r"arr_1 .* int64 \[3\].*the 12"),
    ({"arr_0": PIXELS, "arr_1": LABELS * 0.5}, r"arr_1 .* float64 \[12\]"),
    ({"arr_0": np.array([{}])}, "holds Python objects.*never unpickled"),
    ({"arr_0": PIXELS, "arr_1": np.array([{}] * N)}, r"arr_1 .* object \[12\]"),
  ],
)
def test_npz_files_without_images(tmp_path, arrays, message):
  with pytest.raises(UserError, match=message):
    opening.open_images(_save(tmp_path, **arrays))


def _reads(where) -> bytes:
  found = opening.open_images(where)
  return found.read(np.arange(found.num)).tobytes()


def test_what_is_not_there(tmp_path):
  with pytest.raises(
    UserError, match="no file or folder gone, and no prepared data set 'gone'"
  ):
    opening.open_images("gone", str(tmp_path))
  with pytest.raises(UserError, match=r"no file or folder .*x\.npz, and no"):
    opening.open_images(tmp_path / "x.npz", str(tmp_path))


def test_bad_folders_and_zip_files(tmp_path, monkeypatch):
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(UserError, match=f"^{empty} holds no images"):
    _reads(empty)
  text = tmp_path / "images.zip"
  text.write_text("no zip")
  with pytest.raises(UserError, match=f"^{text} is neither a folder nor"):
    _reads(text)
  mixed = _write_folder(tmp_path / "mixed", PIXELS[:3])
  Image.fromarray(_noise(4, 6, 3)).save(mixed / "000001.png")
  sizes = "'000000.png' is 8 wide and 8 high and '000001.png' 6 wide and 4 high"
  broken = _write_folder(tmp_path / "broken", PIXELS[:3])
  file = broken / "000002.png"
  file.write_bytes(file.read_bytes()[:100])
  for limit, look in ((1 << 30, opening.open_images), (0, _reads)):
    monkeypatch.setattr(image_files, "_HASHED_BYTES", limit)
    for where in (mixed, _zip_folder(mixed, tmp_path / "mixed.zip")):
      with pytest.raises(UserError, match=f"of different sizes: {sizes}"):
        look(where)
  for where in (broken, _zip_folder(broken, tmp_path / "broken.zip")):
    with pytest.raises(UserError, match=r"'000002\.png' cannot be read"):
      _reads(where)


def test_a_run_without_images(tmp_path):
  (tmp_path / "sampling.json").write_text("{}")
  with pytest.raises(UserError, match="sampling into it has not begun"):
    opening.open_images(tmp_path)
  (tmp_path / "latents").mkdir()
  with pytest.raises(UserError, match="holds latents, no images"):
    opening.open_images(tmp_path)


def _flip_bits(data: bytes, position: int) -> bytes:
  return data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damage_goes_unseen(tmp_path, save):
  """Any cut, any changed byte: a UserError, or else the same pixels."""
  path = tmp_path / "x.npz"
  pixels = PIXELS[:2] // 64  # so that they can be compressed
  save(path, pixels, LABELS[:2])
  whole = path.read_bytes()
  for cut in range(0, len(whole), 7):
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"x\.npz is damaged or no"):
      _reads(path)
  refused = 0
  for position in range(0, len(whole), 3):
    path.write_bytes(_flip_bits(whole, position))
    try:
      found = opening.open_images(path)
      np.testing.assert_array_equal(found.read(np.arange(2)), pixels)
      labels = found.labels
    except UserError as error:
      assert "\n" not in str(error)
      refused += 1
      continue
    assert labels is None or (labels == LABELS[:2]).all()
  assert refused > len(whole) // 3 // 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_far_from_the_headers(tmp_path, save):
  """Arrays longer than what zipfile reads, and checks, with their headers."""
  path = tmp_path / "x.npz"
  arrays = {name: _noise(30_000) for name in ("a", "b", "c")}
  save(path, **arrays)
  whole = path.read_bytes()
  members = npz.open_npz(path)
  assert len(npz.hash_npz(members)) == 64
  for name, member in members.items():
    np.testing.assert_array_equal(member.load(), arrays[name])
    for place in (member.info.compress_size // 2, 29_990):
      path.write_bytes(_flip_bits(whole, member.start + place))
      with pytest.raises(UserError, match=rf"x\.npz is damaged.*{name}\.npy"):
        opened = npz.open_npz(path)
        npz.hash_npz(opened)
        opened[name].map()


def test_arrays_that_are_not_as_long_as_their_headers_say(tmp_path):
  path = tmp_path / "x.npz"
  data = io.BytesIO()
  np.save(data, _noise(9000))
  whole = data.getvalue()
  for found, there in ((8999, whole[:-1]), (9001, whole + b"x")):
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("a.npy", there)
    message = f"damaged.*a.npy has {found} bytes of numbers, and 9000 are"
    with pytest.raises(UserError, match=message):
      npz.open_npz(path)


def test_a_file_that_was_written_by_others(tmp_path):
  """Bytes before the archive, unaligned data, and a longer local header."""
  path = tmp_path / "x.npz"
  data = io.BytesIO()
  np.savez(data, PIXELS)
  path.write_bytes(b"self-extracting" + data.getvalue())
  assert _reads(path) == PIXELS.tobytes()
  with zipfile.ZipFile(path, "w") as archive:
    info = zipfile.ZipInfo("arr_0.npy")
    info.extra = b"\xff\xff\x03\x00abc"
    with archive.open(info, "w", force_zip64=True) as member:
      np.save(member, PIXELS)
  assert _reads(path) == PIXELS.tobytes()
  renamed = path.rename(tmp_path / "samples")  # known by what it holds
  assert _reads(renamed) == PIXELS.tobytes()


def test_encrypted_members_are_refused(tmp_path):
  where = _save(tmp_path, arr_0=PIXELS)
  data = bytearray((tmp_path / "x.npz").read_bytes())
  entry = data.rindex(b"PK\x01\x02")
  data[entry + 8] |= 1
  data[6] |= 1
  (tmp_path / "x.npz").write_bytes(data)
  with pytest.raises(UserError, match="encrypted"):
    opening.open_images(where)


def test_little_memory_for_a_large_file(tmp_path):
  """192 MB of images, written and read in 16 MB."""
  shape = (1000, 256, 256, 3)
  blocks = (np.full((8, *shape[1:]), i, np.uint8) for i in range(125))
  tracemalloc.start()
  try:
    stream = npz.Stream(shape, np.uint8, blocks)
    npz.write_npz(tmp_path / "x.npz", {"arr_0": stream})
    found = opening.open_images(tmp_path / "x.npz")
    pixels = found.read(np.array([0, 500, 999]))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
  finally:
    tracemalloc.stop()
  assert pixels[:, 9, 9, 1].tolist() == [0, 62, 124]
  assert (tmp_path / "x.npz").stat().st_size > 190e6


def test_no_room_to_inflate(tmp_path, monkeypatch):
  path = tmp_path / "x.npz"
  np.savez_compressed(path, PIXELS)

  class Full(io.BytesIO):
    def write(self, data):
      raise OSError(28, "No space left on device")

  monkeypatch.setattr(npz.tempfile, "TemporaryFile", Full)
  with pytest.raises(UserError, match="no room to inflate arr_0.npy.*TMPDIR"):
    opening.open_images(path)


def test_a_guard_refuses_images_of_one_colour():
  guard = Guard("these samples")
  guard.see(PIXELS, np.arange(N))
  bad = PIXELS.copy()
  bad[4] = [7, 8, 9]
  bad[6] = 0
  message = (
    r"image 104 of these samples is of one colour, \[7, 8, 9\], throughout"
    r" \(2 of the 12"
  )
  with pytest.raises(UserError, match=message):
    guard.see(bad, 100)
  with pytest.raises(UserError, match="image 3 of these samples"):
    Guard("these samples").see(bad[[6, 0]], np.array([3, 9]))
  almost = PIXELS[:1] * 0
  almost[0, -1, -1, -1] = 255
  Guard("these samples").see(almost, 0)


def test_a_guard_warns_of_real_images_of_one_colour(monkeypatch):
  told = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: told.append(text % a)
  )
  guard = Guard("the photographs", refuse=False)
  guard.see(PIXELS, 0)
  guard.finish()
  assert not told
  white = np.full_like(PIXELS[:3], 255)
  guard.see(white, np.array([20, 21, 21]))
  guard.see(white[:1], np.array([21]))  # again, as padding
  guard.finish()
  assert told == [
    "2 images of the photographs are of one colour throughout, the first being"
    " 20"
  ]


@pytest.mark.parametrize("refuse", [True, False])
def test_a_guard_refuses_a_set_in_0_to_1(refuse):
  guard = Guard("a set", refuse)
  guard.see(PIXELS % 2, 0)
  with pytest.raises(UserError, match=r"exceeds 1: they were in \[0, 1\]"):
    guard.finish()
  guard.see(np.full_like(PIXELS, 2) - PIXELS % 2, N)
  guard.finish()
  Guard("nothing").finish()
