"""Metrics to TensorBoard and the console (clu), sample grids as PNG too.

TensorFlow is imported here and nowhere else in training, only to write
TensorBoard files, with every accelerator hidden from it, and on process 0 only:
it takes seconds.
"""

import io
import os

import jax
import numpy as np

from diffit_jax.sampling.images import page
from diffit_jax.training import workdir


class Writer:
  """The one metric writer; on other processes than the first it is silent."""

  def __init__(self, directory: str | os.PathLike):
    self._directory = workdir.path_of(directory)
    self._writer = None
    if jax.process_index() == 0:
      self._writer = _clu_writer(str(self._directory / "tensorboard"))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of one step."""
    if self._writer is not None:
      with workdir.writing(self._directory):
        self._writer.write_scalars(step, values)

  def text(self, name: str, content: str) -> None:
    """Writes a text file into the workdir."""
    if self._writer is not None:
      with workdir.writing(self._directory):
        (self._directory / name).write_text(content + "\n")

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """Writes uint8 [n, h, w, c] images as one grid, PNG and TensorBoard."""
    if self._writer is None:
      return
    grid = page(images)
    folder = self._directory / "samples"
    with workdir.writing(self._directory):
      folder.mkdir(parents=True, exist_ok=True)
      path = folder / f"{name}_{step:08d}.png"
      workdir.write_whole(path, _png(grid))
      self._writer.write_images(step, {name: grid[None]})

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._writer is not None:
      self._writer.flush()
      self._writer.close()


def _clu_writer(directory: str):
  """To TensorBoard's files in a folder, and to the log."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused; it chatters
  import tensorflow as tf

  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  from clu import metric_writers

  return metric_writers.create_default_writer(directory)


def _png(image: np.ndarray) -> bytes:
  from PIL import Image

  if image.shape[-1] == 1:
    image = image[..., 0]
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return buffer.getvalue()
