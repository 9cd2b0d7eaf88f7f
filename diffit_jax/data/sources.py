"""Where images come from: a folder, or a zip file that is read in place.

Labels:
  dataset.json   EDM's layout: {"labels": [["00000/img00000000.png", 3], ...]}
                 names every image, or `"labels": null` says there are none.
  no such file   images in sub-folders belong to the class of their top-most
                 folder, classes being numbered in sorted order; images that lie
                 side by side have no labels.

Nothing is ever written from an archive, and yet names that would leave a folder
(absolute, "..", symbolic links) are refused: such a file is not what it says.
CHOICE: in a zip any member that is no image (by its suffix) is an error, for an
archive is made to be a data set; in a folder it is passed over.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
import pathlib
import stat
import zipfile

from absl import logging

from diffit_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_LABELS_FILE = "dataset.json"
_MAX_BYTES = 1 << 30  # of one image; more is a decompression bomb
_MAX_LABEL = 999_999


@dataclasses.dataclass(frozen=True)
class Source:
  """Encoded images with names.

  Attributes:
    path: the folder or the zip file.
    sizes: {name: bytes}, in sorted order of the names.
    labels: {name: class}; empty where there are none.
    class_names: names of the classes 0, 1, ...
    read: from a name, the encoded image; raises OSError or zipfile.BadZipFile.
  """

  path: str
  sizes: dict[str, int]
  labels: dict[str, int]
  class_names: list[str]
  read: Callable[[str], bytes]

  def listing_hash(self) -> str:
    """SHA-256 of the names, sizes and labels: tells two sources apart."""
    listing = [[n, s, self.labels.get(n)] for n, s in self.sizes.items()]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def open_source(path: str, use_labels: bool = True) -> Source:
  """Lists a folder or a zip file.

  Args:
    path: the folder or zip file.
    use_labels: False passes over whatever labels there are.

  Raises:
    UserError: missing, empty, not a zip file, or inconsistent.
  """
  if os.path.isdir(path):
    sizes, read, labels_json = _list_folder(pathlib.Path(path))
  elif os.path.isfile(path):
    sizes, read, labels_json = _list_zip(path)
  else:
    raise UserError(f"--source={path} does not exist")
  if not sizes:
    raise UserError(f"--source={path} holds no images ({', '.join(SUFFIXES)})")
  sizes = dict(sorted(sizes.items()))
  labels, class_names = {}, []
  if use_labels and labels_json is not None:
    labels, class_names = _labels_of_json(labels_json, sizes, path)
  elif use_labels:
    labels, class_names = _labels_of_folders(sizes, path)
  return Source(path, sizes, labels, class_names, read)


def _is_image(name: str) -> bool:
  return name.lower().endswith(SUFFIXES) and not _base(name).startswith(".")


def _base(name: str) -> str:
  return name.rsplit("/", 1)[-1]


def _list_folder(root: pathlib.Path) -> tuple[dict, Callable, bytes | None]:
  sizes, others, seen = {}, 0, set()
  for folder, subfolders, files in os.walk(
    root, onerror=_refuse, followlinks=True
  ):
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back
      subfolders.clear()
      continue
    seen.add(real)
    for file in files:
      path = pathlib.Path(folder, file)
      name = path.relative_to(root).as_posix()
      if _is_image(name):
        # A dangling link is listed, so that it is reported as unreadable.
        sizes[name] = path.stat().st_size if path.exists() else 0
      elif name != _LABELS_FILE:
        others += 1
  if others:
    logging.warning("%d files of %s are no images: passed over", others, root)
  labels_file = root / _LABELS_FILE
  labels_json = labels_file.read_bytes() if labels_file.exists() else None
  return sizes, lambda name: (root / name).read_bytes(), labels_json


def _refuse(error: OSError) -> None:
  raise UserError(f"cannot list {error.filename}: {error.strerror}")


def _list_zip(path: str) -> tuple[dict, Callable, bytes | None]:
  try:
    archive = zipfile.ZipFile(path)
  except zipfile.BadZipFile as error:
    raise UserError(
      f"--source={path} is neither a folder nor a sound zip file ({error})"
    ) from error
  sizes, has_labels = {}, False
  for member in archive.infolist():
    _check_member(member, path)
    if member.is_dir():
      continue
    if member.filename == _LABELS_FILE:
      has_labels = True
    elif not _is_image(member.filename):
      raise UserError(
        f"zip file {path} holds {member.filename!r}, which is no image"
        f" ({', '.join(SUFFIXES)}) and not {_LABELS_FILE}"
      )
    elif member.filename in sizes:
      raise UserError(f"zip file {path} holds {member.filename!r} twice")
    else:
      sizes[member.filename] = member.file_size

  def read(name: str) -> bytes:
    if sizes[name] > _MAX_BYTES:
      raise OSError(f"{sizes[name]} bytes are too many")
    return archive.read(name)

  return sizes, read, archive.read(_LABELS_FILE) if has_labels else None


def _check_member(member: zipfile.ZipInfo, path: str) -> None:
  """Refuses names that would leave a folder, links and encryption."""
  name = member.filename
  # ZipInfo turns the platform's separator into "/" and cuts at a NUL.
  parts = member.orig_filename.replace("\\", "/").split("/")
  if (
    name != member.orig_filename
    or "\\" in name
    or ":" in parts[0]
    or parts[0] == ""
    or ".." in parts
  ):
    raise UserError(
      f"zip file {path} holds {member.orig_filename!r}, a path that leads out"
      " of a folder: refused"
    )
  if stat.S_ISLNK(member.external_attr >> 16):
    raise UserError(f"zip file {path} holds {name!r}, a symbolic link: refused")
  if member.flag_bits & 1:
    raise UserError(f"zip file {path} is encrypted ({name!r})")


def _labels_of_json(
  text: bytes, sizes: dict[str, int], path: str
) -> tuple[dict[str, int], list[str]]:
  where = f"{_LABELS_FILE} of {path}"
  try:
    pairs = json.loads(text)["labels"]
    if not pairs:
      return {}, []
    labels = {name: label for name, label in pairs}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{where} is not of the form {{"labels": [[name, class], ...]}} or'
      f' {{"labels": null}} ({error})'
    ) from error
  if len(labels) != len(pairs):
    raise UserError(f"{where} names an image twice")
  for name, label in labels.items():
    if name not in sizes:
      raise UserError(f"{where} names {name!r}, which is not there")
    if type(label) is not int or not 0 <= label <= _MAX_LABEL:
      raise UserError(
        f"{where} gives {name!r} the label {label!r}: labels are whole"
        f" numbers from 0 to {_MAX_LABEL}"
      )
  missing = next((name for name in sizes if name not in labels), None)
  if missing is not None:
    raise UserError(f"{where} gives no label to {missing!r}")
  return labels, [str(label) for label in range(max(labels.values()) + 1)]


def _labels_of_folders(
  sizes: dict[str, int], path: str
) -> tuple[dict[str, int], list[str]]:
  folders = {name: name.split("/")[0] for name in sizes if "/" in name}
  if not folders:
    return {}, []
  loose = next((name for name in sizes if name not in folders), None)
  if loose is not None:
    raise UserError(
      f"--source={path} has images in sub-folders (classes) and outside of"
      f" them ({loose!r}): which class are those?"
    )
  class_names = sorted(set(folders.values()))
  number = {name: index for index, name in enumerate(class_names)}
  return {name: number[folder] for name, folder in folders.items()}, class_names
