"""The files of a sampling run: one per sample, then an npz and a grid.

A file counts as a sample where it is whole and of the right size. Before
sampling only its two ends are read, which is quick; the npz needs every file
as a whole, so damage in between comes to light then, as `Unreadable`.
"""

from collections.abc import Callable
import dataclasses
import io
import os
import pathlib
import struct

from absl import logging
import numpy as np

from diffit_jax import whole
from diffit_jax.npz import Stream, write_npz
from diffit_jax.pictures import page, write_png

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # width, height and type follow
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_TYPES = {1: (8, 0), 3: (8, 2)}  # channels: bits and kind of color
_MAX_NAMES = 10  # of damaged files, in a log line


class Unreadable(Exception):
  """A sample is there, and cannot be read."""


def _read_png(path: pathlib.Path) -> np.ndarray:
  from PIL import Image

  data = path.read_bytes()
  with Image.open(io.BytesIO(data)) as file:
    file.verify()  # check sums, which decoding does not compare
  with Image.open(io.BytesIO(data)) as file:
    image = np.asarray(file)
  return image if image.ndim == 3 else image[..., None]


def _png_fault(path: pathlib.Path, shape: tuple[int, int, int]) -> str | None:
  """Why a file cannot be a PNG of this shape, as far as its ends tell."""
  with path.open("rb") as file:
    start = file.read(len(_PNG_START) + 10)
    file.seek(-min(len(_PNG_END), file.seek(0, os.SEEK_END)), os.SEEK_END)
    end = file.read()
  if not start.startswith(_PNG_START):
    return "no PNG"
  if end != _PNG_END:
    return "cut short"
  height, width, channels = shape
  wanted = struct.pack(">IIBB", width, height, *_PNG_TYPES[channels])
  return None if start.endswith(wanted) else "of another size or type"


def _write_npy(path: pathlib.Path, array: np.ndarray) -> None:
  with whole.writing(path) as partial, partial.open("wb") as file:
    np.save(file, array, allow_pickle=False)


def _npy_fault(path: pathlib.Path, shape: tuple[int, int, int]) -> str | None:
  """Why a file cannot be a float32 array of this shape."""
  try:
    array = np.lib.format.open_memmap(path, mode="r")
  except ValueError:  # of the header, or fewer bytes than it says
    return "damaged"
  is_fit = (array.shape, array.dtype) == (shape, np.float32)
  return None if is_fit else "of another size or type"


@dataclasses.dataclass(frozen=True)
class SampleKind:
  """What one sample is, and how it is kept.

  Attributes:
    name: name of the folder with one file per sample.
    suffix: suffix of these files.
    write: (path, array); never leaves a partial file under that name.
    read: path -> array; raises something where the file is damaged.
    fault: (path, shape [h, w, c]) -> why a file is none of these, or None; what
      its ends do not tell goes unseen.
    prefix: first part of the npz file's name.
  """

  name: str
  suffix: str
  write: Callable[[pathlib.Path, np.ndarray], None]
  read: Callable[[pathlib.Path], np.ndarray]
  fault: Callable[[pathlib.Path, tuple[int, int, int]], str | None]
  prefix: str


IMAGES = SampleKind(
  "images", ".png", write_png, _read_png, _png_fault, "samples"
)
LATENTS = SampleKind(
  "latents",
  ".npy",
  _write_npy,
  lambda path: np.load(path, allow_pickle=False),
  _npy_fault,
  "latents",
)


@dataclasses.dataclass(frozen=True)
class Output:
  """The folder of a sampling run.

  Attributes:
    folder: folder of the run.
    kind: images or latents.
    shape: shape of a sample, [h, w, c].
  """

  folder: pathlib.Path
  kind: SampleKind
  shape: tuple[int, int, int]

  def path(self, i: int) -> pathlib.Path:
    """Where sample i is kept."""
    return self.folder / self.kind.name / f"{i:06d}{self.kind.suffix}"

  def strays(self) -> list[pathlib.Path]:
    """What looks like samples, of any run and kind, wherever they come from."""
    return sorted(
      path
      for kind in (IMAGES, LATENTS)
      for pattern in (f"{kind.name}/*{kind.suffix}", f"{kind.prefix}_*.npz")
      for path in self.folder.glob(pattern)
    )

  def missing(self, num: int, is_thorough: bool = False) -> list[int]:
    """Which of the samples 0..num-1 are still to be made; names damaged ones.

    Args:
      num: samples wanted in all.
      is_thorough: whether to read the files as a whole, and not only their
        ends.
    """
    missing, damaged = [], []
    for i in range(num):
      try:
        fault = self.kind.fault(self.path(i), self.shape)
        if is_thorough and not fault:
          self.read(i)
      except FileNotFoundError:
        missing.append(i)
        continue
      except (OSError, Unreadable) as error:
        fault = str(error)
      if fault:
        missing.append(i)
        damaged.append(f"{self.path(i).name} is {fault}")
    if damaged:
      logging.warning(
        "%d samples in %s are damaged and made anew: %s%s",
        len(damaged),
        self.folder / self.kind.name,
        ", ".join(damaged[:_MAX_NAMES]),
        ", ..." if len(damaged) > _MAX_NAMES else "",
      )
    return missing

  def read(self, i: int) -> np.ndarray:
    """Sample i, [h, w, c].

    Raises:
      Unreadable: its file is damaged, or not of `shape`.
    """
    try:
      sample = self.kind.read(self.path(i))
    except Exception as error:  # Pillow has no one class for damage
      raise Unreadable(f"unreadable ({error})") from error
    if sample.shape != self.shape:
      raise Unreadable(f"of shape {sample.shape}, not {self.shape}")
    return sample

  def write(self, i: int, sample: np.ndarray) -> None:
    """Keeps sample i, [h, w, c]."""
    self.path(i).parent.mkdir(exist_ok=True)
    self.kind.write(self.path(i), sample)

  def finish(
    self, num: int, labels: np.ndarray | None
  ) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Writes the npz, and the grid of images; returns (grid or None, npz).

    Raises:
      Unreadable: one of the samples is damaged; nothing is left of the npz.
    """
    npz = self._write_npz(num, labels)
    if self.kind is not IMAGES:
      return None, npz
    first = [self.read(i) for i in range(min(num, 100))]
    write_png(self.folder / "grid.png", page(np.stack(first)))
    return self.folder / "grid.png", npz

  def _write_npz(self, num: int, labels: np.ndarray | None) -> pathlib.Path:
    """arr_0 [n, h, w, c] and arr_1 labels, sample by sample (ADM's format).

    Images are uint8 with 3 channels; gray is written three times.
    """
    channels = 3 if self.kind is IMAGES else self.shape[-1]
    dtype = np.uint8 if self.kind is IMAGES else np.float32
    shape = (num, *self.shape[:2], channels)
    read = lambda i: np.broadcast_to(self.read(i), shape[1:])
    members = {
      "arr_0": Stream(shape, dtype, (read(i)[None] for i in range(num)))
    }
    if labels is not None:
      members["arr_1"] = labels.astype(np.int64)
    path = self.folder / f"{self.kind.prefix}_{'x'.join(map(str, shape))}.npz"
    write_npz(path, members)
    return path
