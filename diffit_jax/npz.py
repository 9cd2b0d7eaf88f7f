"""Large arrays in .npz files, read and written without holding them.

An .npz file is a zip archive of .npy files. Where a member is stored as it is,
its bytes lie in one piece of the archive and are mapped from there; a
compressed one is inflated into a nameless temporary file, which is mapped.
Nothing is ever unpickled: arrays of objects are refused.

numpy checks no sum of what is mapped, so `hash_npz`, which reads the whole file
once, compares the zip's check sums on its way.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import math
import mmap
import os
import pathlib
import struct
import tempfile
import zipfile
import zlib

import numpy as np

from diffit_jax import whole
from diffit_jax.errors import UserError

_CHUNK = 1 << 22  # bytes
_SUFFIX = ".npy"


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """One array of an archive: its header, and where its numbers lie.

  Attributes:
    path: the archive.
    info: zipfile's entry.
    start: place of the member's first byte in the archive.
    header_size: bytes of the .npy header, before the numbers.
    shape: shape of the array.
    dtype: type of the array.
    order: "C" or "F".
  """

  path: pathlib.Path
  info: zipfile.ZipInfo
  start: int
  header_size: int
  shape: tuple[int, ...]
  dtype: np.dtype
  order: str

  @property
  def is_stored(self) -> bool:
    """Whether the bytes lie in the archive as they are."""
    return self.info.compress_type == zipfile.ZIP_STORED

  def map(self) -> np.ndarray:
    """The array, read-only, its numbers staying on disk until they are used.

    Raises:
      UserError: objects; damaged, where compressed; no room to inflate it.
    """
    if self.dtype.hasobject:
      raise UserError(
        f"{self.path}: {self.info.filename} holds Python objects, which are"
        " never unpickled: save it as an array of numbers"
      )
    if self.is_stored:
      with _errors_named(self.path), self.path.open("rb") as file:
        return self._view(file, self.start + self.header_size)
    with tempfile.TemporaryFile() as file:
      self._inflate(file)
      return self._view(file, self.header_size)

  def load(self) -> np.ndarray:
    """The array, in memory."""
    return np.array(self.map())

  def _view(self, file, offset: int) -> np.ndarray:
    buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.ndarray(
      self.shape, self.dtype, buffer, offset=offset, order=self.order
    )

  def _inflate(self, file) -> None:
    with (
      _errors_named(self.path),
      zipfile.ZipFile(self.path) as archive,
      archive.open(self.info) as member,
    ):
      while chunk := member.read(_CHUNK):
        try:
          file.write(chunk)
          file.flush()
        except OSError as error:
          raise UserError(
            f"no room to inflate {self.info.filename} of {self.path}"
            f" ({self.info.file_size} bytes) in {tempfile.gettempdir()}"
            f" ({error.strerror}): make room, or set TMPDIR to another folder"
          ) from error


def is_npz(path: str | os.PathLike) -> bool:
  """Whether a file is to be read as .npz: by its suffix, or what it holds."""
  if str(path).endswith(".npz"):
    return True
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith(_SUFFIX) for name in archive.namelist())
  except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
    return False  # ValueError: a name that is not the UTF-8 it claims to be


def open_npz(path: str | os.PathLike) -> dict[str, Member]:
  """The arrays of an .npz file by name; only their headers are read.

  Raises:
    UserError: missing, truncated, damaged or no .npz file.
  """
  path = pathlib.Path(path)
  with _errors_named(path), zipfile.ZipFile(path) as archive:
    return {
      info.filename.removesuffix(_SUFFIX): _read_header(path, archive, info)
      for info in archive.infolist()
      if info.filename.endswith(_SUFFIX)
    }


def hash_npz(members: Mapping[str, Member]) -> str:
  """SHA-256 of the archive file; checks the sums of its stored members.

  Args:
    members: members of one archive, as `open_npz` gives them; at least one.

  Raises:
    UserError: a member is not what was written.
  """
  path = next(iter(members.values())).path
  stored = [member for member in members.values() if member.is_stored]
  sums, digest, position = [0] * len(stored), hashlib.sha256(), 0
  with _errors_named(path), path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      for i, member in enumerate(stored):
        begin = max(member.start - position, 0)
        end = max(member.start + member.info.file_size - position, 0)
        sums[i] = zlib.crc32(memoryview(chunk)[begin:end], sums[i])
      position += len(chunk)
  for member, found in zip(stored, sums):
    if found != member.info.CRC:
      raise UserError(
        f"{path} is damaged (the check sum of {member.info.filename} is not"
        " the one that was written): make or download it again"
      )
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Stream:
  """An array that is written block by block.

  Attributes:
    shape: shape of the whole.
    dtype: type of the whole, and of every block.
    blocks: [k, *shape[1:]] each, shape[0] rows in all.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  blocks: Iterator[np.ndarray]


def write_npz(
  path: str | os.PathLike, members: Mapping[str, np.ndarray | Stream]
) -> None:
  """Writes arrays, stored uncompressed in C order, under headers of version 1.

  The file appears under `path` when it is whole, and what stops the writing
  leaves nothing behind; equal arrays make equal files.

  Raises:
    OSError: it cannot be written.
    ValueError: blocks that are not what their `Stream` says.
  """
  with whole.writing(path) as partial:
    _write_members(partial, members)


def _write_members(path: pathlib.Path, members: Mapping) -> None:
  with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
    for name, array in members.items():
      # A ZipInfo of its own has the date 1980, and not the present one.
      info = zipfile.ZipInfo(name + _SUFFIX)
      with archive.open(info, "w", force_zip64=True) as member:
        if isinstance(array, Stream):
          _write_stream(member, array)
        else:
          array = np.asarray(array, order="C")
          np.lib.format.write_array(
            member, array, version=(1, 0), allow_pickle=False
          )


def _write_stream(file, stream: Stream) -> None:
  shape, dtype = tuple(map(int, stream.shape)), np.dtype(stream.dtype)
  header = {
    "descr": np.lib.format.dtype_to_descr(dtype),
    "fortran_order": False,
    "shape": shape,
  }
  np.lib.format.write_array_header_1_0(file, header)
  rows = 0
  for block in stream.blocks:
    rows += len(block)
    if block.dtype != dtype or block.shape[1:] != shape[1:] or rows > shape[0]:
      raise ValueError(
        f"a block of {block.dtype} {block.shape} ends at row {rows} of an array"
        f" of {dtype} {shape}"
      )
    file.write(np.ascontiguousarray(block).data)
  if rows != shape[0]:
    raise ValueError(f"the blocks have {rows} rows, the array {shape[0]}")


def _read_header(
  path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Member:
  """Reads the .npy header of a member; whatever is wrong raises something."""
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
      header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
      header = np.lib.format.read_array_header_2_0(file)
    else:
      raise ValueError(f"{info.filename} is of .npy version {version}")
    shape, is_fortran, dtype = header
    size = file.tell()
  if min(shape, default=0) < 0:
    raise ValueError(f"{info.filename} has shape {shape}")
  wanted = math.prod(map(int, shape)) * dtype.itemsize
  if not dtype.hasobject and size + wanted != info.file_size:
    raise ValueError(
      f"{info.filename} has {info.file_size - size} bytes of numbers, and"
      f" {wanted} are needed"
    )
  start = _data_start(path, info)
  order = "F" if is_fortran else "C"
  return Member(path, info, start, size, tuple(shape), dtype, order)


def _data_start(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
  """Where a member's bytes begin: behind its local header (30 + names)."""
  with path.open("rb") as file:
    file.seek(info.header_offset)
    name, extra = struct.unpack("<26x2H", file.read(30))
  return info.header_offset + 30 + name + extra


@contextlib.contextmanager
def _errors_named(path: pathlib.Path) -> Iterator[None]:
  """Makes a UserError of whatever reading an archive raises."""
  try:
    yield
  except UserError:
    raise
  except FileNotFoundError as error:
    raise UserError(f"there is no file {path}") from error
  except PermissionError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  # zipfile, zlib, lzma and numpy's headers have no common class for damage.
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(
      f"{path} is damaged or no .npz file ({reason}): make or download it again"
    ) from error
