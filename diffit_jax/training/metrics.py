"""Metrics to TensorBoard and the log, sample grids as PNG too."""

import io
import os

from absl import logging
import jax
import numpy as np

from diffit_jax.sampling.images import page
from diffit_jax.training import events, workdir


class Writer:
  """The one metric writer; on other processes than the first it is silent.

  Raises:
    UserError: in each method, where the file system refuses.
  """

  def __init__(self, directory: str | os.PathLike):
    self._directory = workdir.path_of(directory)
    self._events = None
    if jax.process_index() == 0:
      self._events = events.EventWriter(self._directory / "tensorboard")

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of one step."""
    if self._events is not None:
      texts = [f"{name}={x:.6g}" for name, x in sorted(values.items())]
      logging.info("[%d] %s", step, ", ".join(texts))
      with workdir.writing(self._directory):
        self._events.scalars(step, values)

  def text(self, name: str, content: str) -> None:
    """Writes a text file into the workdir."""
    if self._events is not None:
      with workdir.writing(self._directory):
        (self._directory / name).write_text(content + "\n")

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """Writes uint8 [n, h, w, c] images as one grid, PNG and TensorBoard."""
    if self._events is None:
      return
    grid = page(images)
    png, (height, width, _) = _png(grid), grid.shape
    path = self._directory / "samples" / f"{name}_{step:08d}.png"
    with workdir.writing(self._directory):
      path.parent.mkdir(parents=True, exist_ok=True)
      workdir.write_whole(path, png)
      self._events.image(step, name, png, (width, height))
    logging.info("[%d] wrote %s", step, path)

  def flush(self) -> None:
    """Writes what is held back; a checkpoint must wait for it."""
    if self._events is not None:
      with workdir.writing(self._directory):
        self._events.flush()

  def close(self) -> None:
    """Writes what is held back."""
    self.flush()


def _png(image: np.ndarray) -> bytes:
  from PIL import Image

  if image.shape[-1] == 1:
    image = image[..., 0]
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="PNG")
  return buffer.getvalue()
