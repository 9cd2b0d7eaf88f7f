"""Folders and zip files: names, labels, and everything that is refused."""

import io
import json
import os
import stat
import zipfile

import pytest

from diffit_jax.data import sources
from diffit_jax.errors import UserError


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
    ("__MACOSX/._a.png", "which is no image"),
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


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
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
