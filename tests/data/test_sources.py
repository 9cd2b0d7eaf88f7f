"""Folders and zip files: names, labels, and everything that is refused."""

import dataclasses
import io
import json
import os
import stat
import zipfile

import pytest

from diffit_jax import npz
from diffit_jax.data import sources
from diffit_jax.errors import UserError


def _folder(path, members) -> str:
  for member in members:
    file = path / member
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
  return str(path)


def _zip(path, members, labels=None) -> str:
  with zipfile.ZipFile(path, "w") as archive:
    for member in members:
      archive.writestr(member, b"x")
    if labels is not None:
      archive.writestr("dataset.json", json.dumps(labels))
  return str(path)


def test_a_folder_is_listed_in_order_with_labels_of_its_subfolders(tmp_path):
  for name in ("dog/b.JPG", "cat/deep/a.png", "cat/z.WebP", "cat/n.txt"):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(name.encode())
  (tmp_path / ".DS_Store").write_bytes(b"")
  (tmp_path / "dog" / "._b.jpg").write_bytes(b"")  # macOS leaves these
  source = sources.open_source(str(tmp_path))
  assert list(source.sizes) == ["cat/deep/a.png", "cat/z.WebP", "dog/b.JPG"]
  assert list(source.labels.values()) == [0, 0, 1]
  assert source.class_names == ["cat", "dog"]
  assert source.read("dog/b.JPG") == b"dog/b.JPG"


_KEPT = {"bee/0.png": 0, "wasp/deep/1.png": 1}
_LITTER = (
  ".ipynb_checkpoints/0-checkpoint.png",
  ".@__thumb/default0.png",
  "@eaDir/0.png/thumb.jpg",
  "__MACOSX/bee/._0.png",
  "bee/.thumbs/0.png",
  "wasp/.DS_Store",
  "wasp/Thumbs.db",
)


@pytest.mark.parametrize("make", [_folder, _zip])
def test_hidden_files_and_folders_are_no_classes(tmp_path, make):
  source = sources.open_source(make(tmp_path / "x", [*_LITTER, *_KEPT]))
  assert source.labels == _KEPT
  assert source.class_names == ["bee", "wasp"]
  source = sources.open_source(source.path, use_labels=False)
  assert list(source.sizes) == list(_KEPT)


def test_a_hidden_name_may_still_not_lead_out(tmp_path):
  path = _zip(tmp_path / "x.zip", ["a.png", "__MACOSX/../../b.png"])
  with pytest.raises(UserError, match="a path that leads out"):
    sources.open_source(path)


def test_names_in_a_zip_are_normalized(tmp_path):
  names = ["./wasp/1.png", "./bee//0.png", "wasp/./2.png"]
  source = sources.open_source(_zip(tmp_path / "x.zip", names))
  assert source.labels == {"bee/0.png": 0, "wasp/1.png": 1, "wasp/2.png": 1}
  assert source.read("bee/0.png") == b"x"
  labels = {"labels": [["./b/0.png", 1], ["a/0.png", 0]]}
  path = _zip(tmp_path / "y.zip", ["b/0.png", "./a/0.png"], labels)
  assert sources.open_source(path).labels == {"a/0.png": 0, "b/0.png": 1}
  path = _zip(tmp_path / "z.zip", ["a/0.png", "a//0.png"])
  with pytest.raises(UserError, match="'a/0.png' twice"):
    sources.open_source(path)


@pytest.mark.parametrize("make", [_folder, _zip])
def test_a_folder_that_wraps_the_set_is_no_class(tmp_path, make):
  names = [f"2024/insects/{name}" for name in _KEPT]
  source = sources.open_source(make(tmp_path / "x", names))
  assert source.class_names == ["bee", "wasp"]
  assert source.labels == dict(zip(names, _KEPT.values()))
  # One class is one class, however deep its images lie.
  names = ["wasp/1.png", "wasp/deep/2.png"]
  source = sources.open_source(make(tmp_path / "y", names))
  assert source.class_names == ["wasp"]


def test_a_wrapped_set_brings_its_labels_along(tmp_path):
  root = tmp_path / "x"
  _folder(root, ["faces/00000/0.png", "faces/00000/1.png"])
  labels = '{"labels": [["00000/0.png", 1], ["00000/1.png", 0]]}'
  (root / "faces" / "dataset.json").write_text(labels)
  source = sources.open_source(str(root))
  assert source.labels == {"faces/00000/0.png": 1, "faces/00000/1.png": 0}


def test_class_folders_called_by_numbers_are_in_numerical_order(tmp_path):
  names = [f"{number}/0.png" for number in (100, 9, 20, 0)]
  source = sources.open_source(_folder(tmp_path / "x", names))
  assert source.class_names == ["0", "9", "20", "100"]
  assert source.labels["20/0.png"] == 2
  # A set that was made when the order was that of text is another one.
  as_text = {f"{n}/0.png": i for i, n in enumerate(["0", "100", "20", "9"])}
  before = dataclasses.replace(source, labels=as_text)
  assert source.listing_hash() != before.listing_hash()
  names = [*names, "ten/0.png"]
  source = sources.open_source(_folder(tmp_path / "y", names))
  assert source.class_names == ["0", "100", "20", "9", "ten"]


def test_class_names_are_lines_of_proper_text(tmp_path):
  folders = [os.fsdecode(b"caf\xe9"), "a\nb", " tea ", "d"]
  names = [f"{folder}/0.png" for folder in folders]
  source = sources.open_source(_folder(tmp_path / "x", names))
  assert source.class_names == ["tea", r"a\nb", r"caf\xe9", "d"]
  for number, folders in enumerate([["tea", "tea "], ["a", "  "]]):
    names = [f"{name}/0.png" for name in folders]
    with pytest.raises(UserError, match="no name|the same name as 'tea'"):
      sources.open_source(_folder(tmp_path / f"{number}", names))


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda data, at: data.replace(b'"labels"', b'"lAbels"'), "Bad CRC-32"),
    # Deflate64, which Python does not have, in the central directory.
    (
      lambda data, at: data[: at + 10] + b"\t\0" + data[at + 12 :],
      "That compression method is not supported",
    ),
  ],
)
def test_labels_that_cannot_be_read_are_one_sentence(tmp_path, damage, message):
  path = tmp_path / "x.zip"
  _zip(path, ["a.png"], {"labels": [["a.png", 0]]})
  data = path.read_bytes()
  path.write_bytes(damage(data, data.rindex(b"PK\1\2")))
  with pytest.raises(UserError, match=f"dataset.json of .* read .*{message}"):
    sources.open_source(str(path))


def test_a_zip_whose_directory_is_damaged_is_one_sentence(tmp_path):
  path = tmp_path / "x.zip"
  _zip(path, ["é.png"])
  data = path.read_bytes()
  path.write_bytes(data.replace("é".encode(), b"\xff\xff"))  # no UTF-8
  assert not npz.is_npz(path)  # asked first where images are to be scored
  with pytest.raises(UserError, match="neither a folder nor a sound zip file"):
    sources.open_source(str(path))


def test_a_link_that_leads_back_ends(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "x.png").write_bytes(b"x")
  (tmp_path / "a" / "loop").symlink_to(tmp_path)
  assert list(sources.open_source(str(tmp_path)).sizes) == ["a/x.png"]


def test_images_side_by_side_have_no_labels(tmp_path):
  path = _zip(tmp_path / "x.zip", ["b.png", "a.jpeg"])
  source = sources.open_source(path)
  assert list(source.sizes) == ["a.jpeg", "b.png"]
  assert (source.labels, source.class_names) == ({}, [])


def test_edm_layout_takes_its_labels_from_the_json(tmp_path):
  names = ["00000/img00000000.png", "00000/img00000001.png"]
  labels = {"labels": [[names[1], 0], [names[0], 3]]}
  source = sources.open_source(_zip(tmp_path / "x.zip", names, labels))
  assert source.labels == {names[0]: 3, names[1]: 0}
  assert source.class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("labels", [{"labels": None}, {"labels": []}])
def test_edm_layout_may_have_no_labels(tmp_path, labels):
  path = _zip(tmp_path / "x.zip", ["00000/a.png", "00001/b.png"], labels)
  assert sources.open_source(path).labels == {}


def test_a_folder_may_have_the_json_too(tmp_path):
  (tmp_path / "00000").mkdir()
  (tmp_path / "00000" / "a.png").write_bytes(b"x")
  (tmp_path / "dataset.json").write_text('{"labels": [["00000/a.png", 1]]}')
  source = sources.open_source(str(tmp_path))
  assert source.labels == {"00000/a.png": 1}
  assert sources.open_source(str(tmp_path), use_labels=False).labels == {}


def test_the_listing_hash_tells_sources_apart(tmp_path):
  def listing_hash(number, *arguments):
    path = _zip(tmp_path / f"{number}.zip", *arguments)
    return sources.open_source(path).listing_hash()

  base = listing_hash(0, ["a.png", "b.png"])
  assert base == listing_hash(1, ["b.png", "a.png"])
  assert base != listing_hash(2, ["a.png", "c.png"])
  assert base != listing_hash(
    3, ["a.png", "b.png"], {"labels": [["a.png", 0], ["b.png", 0]]}
  )


@pytest.mark.parametrize(
  "member, message",
  [
    ("/etc/a.png", "'/etc/a.png', a path that leads out"),
    ("../a.png", "'../a.png', a path that leads out"),
    ("a/../../b.png", "a path that leads out"),
    ("a\\..\\b.png", "a path that leads out"),
    ("C:/a.png", "'C:/a.png', a path that leads out"),
    ("readme.txt", "'readme.txt', which is no image"),
    ("sub/dataset.json", "'sub/dataset.json', which is no image"),
  ],
)
def test_a_zip_with_a_trick_or_a_stranger_is_refused(tmp_path, member, message):
  path = _zip(tmp_path / "x.zip", ["a.png", member])
  with pytest.raises(UserError, match=message.replace("\\", r"\\")):
    sources.open_source(path)


def test_a_zip_with_a_symbolic_link_is_refused(tmp_path):
  link = zipfile.ZipInfo("link.png")
  link.external_attr = (stat.S_IFLNK | 0o777) << 16
  path = _zip(tmp_path / "x.zip", ["a.png", link])
  with pytest.raises(UserError, match="'link.png', a symbolic link: refused"):
    sources.open_source(path)


def test_an_encrypted_zip_is_refused(tmp_path):
  path = tmp_path / "x.zip"
  _zip(path, ["a.png"])
  data = bytearray(path.read_bytes())
  data[data.index(b"PK\1\2") + 8] |= 1  # the flag, in the central directory
  path.write_bytes(data)
  with pytest.raises(UserError, match="is encrypted"):
    sources.open_source(str(path))


def test_a_member_that_is_there_twice_is_refused(tmp_path):
  with pytest.warns(UserWarning, match="Duplicate name"):
    path = _zip(tmp_path / "x.zip", ["a.png", "a.png"])
  with pytest.raises(UserError, match="'a.png' twice"):
    sources.open_source(path)


def test_a_member_that_claims_to_be_huge_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_MAX_BYTES", 0)
  source = sources.open_source(_zip(tmp_path / "x.zip", ["a.png"]))
  with pytest.raises(OSError, match="1 bytes are too many"):
    source.read("a.png")


@pytest.mark.parametrize(
  "labels, message",
  [
    ([["a.png", 0], ["gone.png", 1]], "'gone.png', which is not there"),
    ([["a.png", 0]], "gives no label to 'b.png'"),
    ([["a.png", 0], ["a.png", 1]], "names an image twice"),
    ([["a.png", 0], ["b.png", -1]], "'b.png' the label -1: labels are"),
    ([["a.png", 0], ["b.png", 0.5]], "'b.png' the label 0.5"),
    ([["a.png", 0], ["b.png", True]], "'b.png' the label True"),
    ([["a.png", 0], ["b.png", 10**9]], "'b.png' the label 1000000000"),
    ([["a.png"], ["b.png", 1]], "is not of the form"),
    (5, "is not of the form"),
  ],
)
def test_inconsistent_labels_are_refused(tmp_path, labels, message):
  path = _zip(tmp_path / "x.zip", ["a.png", "b.png"], {"labels": labels})
  with pytest.raises(UserError, match=message):
    sources.open_source(path)


@pytest.mark.parametrize(
  "text", ["{", "[]", "{}", "null", "[" * 100_000, '{"labels": [[0, 0]]}']
)
def test_a_json_of_another_form_is_refused(tmp_path, text):
  (tmp_path / "a.png").write_bytes(b"x")
  (tmp_path / "dataset.json").write_text(text)
  with pytest.raises(UserError, match="dataset.json of .* is not of the form"):
    sources.open_source(str(tmp_path))


def test_images_in_and_outside_of_classes_are_refused(tmp_path):
  path = _zip(tmp_path / "x.zip", ["cat/a.png", "b.png"])
  with pytest.raises(UserError, match=r"outside of them \('b.png'\)"):
    sources.open_source(path)


def test_a_source_must_be_there_and_hold_images(tmp_path):
  with pytest.raises(UserError, match="gone does not exist"):
    sources.open_source(str(tmp_path / "gone"))
  with pytest.raises(UserError, match="holds no images"):
    sources.open_source(str(tmp_path))
  with pytest.raises(UserError, match="holds no images"):
    sources.open_source(_zip(tmp_path / "x.zip", []))
  (tmp_path / "x.tar").write_bytes(b"no zip")
  with pytest.raises(UserError, match="neither a folder nor a sound zip file"):
    sources.open_source(str(tmp_path / "x.tar"))


def test_reading_a_zip_writes_nothing(tmp_path):
  before = io.BytesIO()
  with zipfile.ZipFile(before, "w") as archive:
    archive.writestr("a/b.png", b"x")
  path = tmp_path / "x.zip"
  path.write_bytes(before.getvalue())
  assert sources.open_source(str(path)).read("a/b.png") == b"x"
  assert os.listdir(tmp_path) == ["x.zip"]
  assert path.read_bytes() == before.getvalue()
