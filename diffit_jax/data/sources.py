"""Where images come from: a folder, or a zip file that is read in place.

Labels are those of `data.classes`. Hidden files and folders, which operating
systems and tools leave behind (`.DS_Store`, `.ipynb_checkpoints`, `@eaDir`,
`__MACOSX`), are passed over.

Nothing is ever written from an archive, and yet names that would leave a folder
(absolute, "..", symbolic links) are refused: such a file is not what it says.
CHOICE: in a zip any member that is no image (by its suffix) is an error, for an
archive is made to be a data set; in a folder it is passed over.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import lzma
import os
import pathlib
import stat
import zipfile

from absl import logging

from diffit_jax.data import classes, transforms
from diffit_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_BYTES = 1 << 30  # of one image; more is a decompression bomb
# What reading an image raises: decoding, and a damaged or strange zip member.
UNREADABLE = transforms.UNREADABLE + (
  zipfile.BadZipFile,
  NotImplementedError,
  RuntimeError,
  lzma.LZMAError,
)
# Beside names that begin with a dot; in small letters.
_HIDDEN = {
  *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin"),
  *("system volume information", "lost+found", "thumbs.db", "desktop.ini"),
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Encoded images with names.

  Attributes:
    path: the folder or the zip file.
    sizes: {name: bytes}, in sorted order of the names.
    labels: {name: class}; empty where there are none.
    class_names: names of the classes 0, 1, ...
    read: from a name, the encoded image; raises what `UNREADABLE` lists.
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
    listing = _list_folder(pathlib.Path(path))
  elif os.path.isfile(path):
    listing = _list_zip(path)
  else:
    raise UserError(f"--source={path} does not exist")
  if not listing.sizes:
    raise UserError(f"--source={path} holds no images ({', '.join(SUFFIXES)})")
  sizes = dict(sorted(listing.sizes.items()))
  wrapper = classes.wrapping_folder(sizes, listing.labels_files)
  labels_file = wrapper + classes.LABELS_FILE
  stray = listing.labels_files - {labels_file}
  if stray:
    listing.refuse_or_tell(min(stray))
  labels, class_names = {}, []
  if use_labels and labels_file in listing.labels_files:
    text = _read_labels_file(listing, labels_file, path)
    labels, class_names = classes.of_json(text, sizes, wrapper, path)
  elif use_labels:
    labels, class_names = classes.of_folders(sizes, wrapper, path)
  return Source(path, sizes, labels, class_names, listing.read)


@dataclasses.dataclass(frozen=True)
class _Listing:
  """What lies in a folder or zip file, apart from hidden files.

  Attributes:
    sizes: {name: bytes} of the images.
    labels_files: names of the files called dataset.json.
    read: from a name, the file.
    refuse_or_tell: what to do about a file that has no place in it.
  """

  sizes: dict[str, int]
  labels_files: set[str]
  read: Callable[[str], bytes]
  refuse_or_tell: Callable[[str], None]


def _is_image(name: str) -> bool:
  return name.lower().endswith(SUFFIXES)


def _is_hidden(name: str) -> bool:
  return any(
    part.startswith(".") or part.lower() in _HIDDEN for part in name.split("/")
  )


def _is_labels_file(name: str) -> bool:
  return name.rsplit("/", 1)[-1] == classes.LABELS_FILE


def _list_folder(root: pathlib.Path) -> _Listing:
  sizes, labels_files, strangers, hidden, seen = {}, set(), 0, [], set()
  for folder, subfolders, files in os.walk(
    root, onerror=_refuse, followlinks=True
  ):
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back
      subfolders.clear()
      continue
    seen.add(real)
    hidden += [each for each in subfolders if _is_hidden(each)]
    subfolders[:] = [each for each in subfolders if not _is_hidden(each)]
    for file in files:
      path = pathlib.Path(folder, file)
      name = path.relative_to(root).as_posix()
      if _is_hidden(file) or not (_is_image(file) or _is_labels_file(file)):
        strangers += 1
      elif _is_labels_file(file):
        labels_files.add(name)
      else:
        # A dangling link is listed, so that it is reported as unreadable.
        sizes[name] = path.stat().st_size if path.exists() else 0
  if strangers:
    logging.warning(
      "%d files of %s are no images: passed over", strangers, root
    )
  if hidden:
    names = ", ".join(sorted(set(hidden)))
    logging.warning("hidden folders of %s are passed over: %s", root, names)
  return _Listing(
    sizes,
    labels_files,
    lambda name: (root / name).read_bytes(),
    lambda name: logging.warning(
      "%s of %s is passed over: it is not where the set begins", name, root
    ),
  )


def _refuse(error: OSError) -> None:
  raise UserError(f"cannot list {error.filename}: {error.strerror}")


def _list_zip(path: str) -> _Listing:
  try:
    archive = zipfile.ZipFile(path)
  except UNREADABLE as error:
    raise UserError(
      f"--source={path} is neither a folder nor a sound zip file ({error})"
    ) from error
  members, num_hidden = {}, 0

  def refuse(name: str) -> None:
    raise UserError(
      f"zip file {path} holds {name!r}, which is no image"
      f" ({', '.join(SUFFIXES)}) and not {classes.LABELS_FILE}"
    )

  for member in archive.infolist():
    _check_member(member, path)
    name = classes.normalize(member.filename)
    if member.is_dir():
      continue
    if _is_hidden(name):
      num_hidden += 1
    elif not (_is_image(name) or _is_labels_file(name)):
      refuse(name)
    elif name in members:
      raise UserError(f"zip file {path} holds {name!r} twice")
    else:
      members[name] = member
  if num_hidden:
    logging.warning("%d hidden files of %s are passed over", num_hidden, path)

  def read(name: str) -> bytes:
    size = members[name].file_size
    if size > _MAX_BYTES:
      raise OSError(f"{size} bytes are too many")
    return archive.read(members[name])

  sizes = {name: x.file_size for name, x in members.items() if _is_image(name)}
  return _Listing(sizes, members.keys() - sizes.keys(), read, refuse)


def _read_labels_file(listing: _Listing, name: str, path: str) -> bytes:
  try:
    return listing.read(name)
  except UNREADABLE as error:
    raise UserError(
      f"{name} of {path} cannot be read ({error}): the labels are in it, so"
      " write it anew (in a zip file stored, or compressed by deflate)"
    ) from error


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
