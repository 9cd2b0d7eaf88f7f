"""The files of a sampling run: one per sample, then an npz and a grid."""

from collections.abc import Callable
import dataclasses
import os
import pathlib

import numpy as np

from diffit_jax.npz import Stream, write_npz
from diffit_jax.sampling.images import page, write_png


def _read_png(path: pathlib.Path) -> np.ndarray:
  from PIL import Image

  with Image.open(path) as file:
    image = np.asarray(file)
  return image if image.ndim == 3 else image[..., None]


def _write_npy(path: pathlib.Path, array: np.ndarray) -> None:
  partial = path.with_name(path.name + ".partial")
  with partial.open("wb") as file:
    np.save(file, array, allow_pickle=False)
  os.replace(partial, path)


@dataclasses.dataclass(frozen=True)
class Kind:
  """What one sample is, and how it is kept.

  Attributes:
    name: of the folder with one file per sample.
    suffix: of these files.
    write: (path, array); never leaves a partial file under that name.
    read: path -> array.
    prefix: of the npz file's name.
  """

  name: str
  suffix: str
  write: Callable[[pathlib.Path, np.ndarray], None]
  read: Callable[[pathlib.Path], np.ndarray]
  prefix: str


IMAGES = Kind("images", ".png", write_png, _read_png, "samples")
LATENTS = Kind(
  "latents",
  ".npy",
  _write_npy,
  lambda path: np.load(path, allow_pickle=False),
  "latents",
)


@dataclasses.dataclass(frozen=True)
class Output:
  """The folder of a sampling run.

  Attributes:
    folder: of the run.
    kind: images or latents.
  """

  folder: pathlib.Path
  kind: Kind

  def path(self, i: int) -> pathlib.Path:
    """Where sample i is kept."""
    return self.folder / self.kind.name / f"{i:06d}{self.kind.suffix}"

  def write(self, i: int, sample: np.ndarray) -> None:
    """Keeps sample i, [h, w, c]."""
    self.path(i).parent.mkdir(exist_ok=True)
    self.kind.write(self.path(i), sample)

  def finish(
    self, num: int, labels: np.ndarray | None
  ) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Writes the npz, and the grid of images; returns (grid or None, npz)."""
    npz = self._write_npz(num, labels)
    if self.kind is not IMAGES:
      return None, npz
    first = [self.kind.read(self.path(i)) for i in range(min(num, 100))]
    write_png(self.folder / "grid.png", page(np.stack(first)))
    return self.folder / "grid.png", npz

  def _write_npz(self, num: int, labels: np.ndarray | None) -> pathlib.Path:
    """arr_0 [n, h, w, c] and arr_1 labels, sample by sample (ADM's format).

    Images are uint8 with 3 channels; gray is written three times.
    """
    sample = self.kind.read(self.path(0))
    channels = 3 if self.kind is IMAGES else sample.shape[-1]
    shape = (num, *sample.shape[:2], channels)
    read = lambda i: np.broadcast_to(self.kind.read(self.path(i)), shape[1:])
    members = {
      "arr_0": Stream(shape, sample.dtype, (read(i)[None] for i in range(num)))
    }
    if labels is not None:
      members["arr_1"] = labels.astype(np.int64)
    path = self.folder / f"{self.kind.prefix}_{'x'.join(map(str, shape))}.npz"
    write_npz(path, members)
    return path
