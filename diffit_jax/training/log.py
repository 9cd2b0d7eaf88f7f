"""Metrics to the run's trackers, a line of them to read, grids as PNG files."""

import os

from absl import logging
from etils import epath
import jax
from ml_collections import config_dict
import numpy as np

from diffit_jax import pictures, progress
from diffit_jax.run import workdir
from diffit_jax.training import trackers

# What the console calls the parts of `timing`.
_WAITS = {"data_wait": "data", "checkpoint": "saves"}


class Writer:
  """The one metric writer; on other processes than the first it is silent.

  Raises:
    UserError: in each method, where the file system refuses.
  """

  def __init__(
    self, directory: str | os.PathLike, config: config_dict.ConfigDict
  ):
    """Opens the trackers that the config names."""
    self._directory = workdir.path_of(directory)
    self._is_silent = jax.process_index() != 0
    self._trackers = []
    if not self._is_silent:
      self._trackers = trackers.open_all(self._directory, config)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of one step."""
    with workdir.writing(self._directory):
      for tracker in self._trackers:
        tracker.scalars(step, values)

  def text(self, name: str, content: str) -> None:
    """Writes a text file into the workdir."""
    if self._is_silent:
      return
    with workdir.writing(self._directory):
      (self._directory / name).write_text(content + "\n")
      for tracker in self._trackers:
        tracker.text(name, content)

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """Writes uint8 [n, h, w, c] images as one grid, to trackers and as PNG.

    The PNG comes last: where it is, all is (`has_images`).
    """
    if self._is_silent:
      return
    grid, path = pictures.page(images), self._grid(step, name)
    with workdir.writing(self._directory):
      for tracker in self._trackers:
        tracker.images(step, name, grid)
        tracker.flush()
      path.parent.mkdir(parents=True, exist_ok=True)
      workdir.write_whole(path, pictures.to_png(grid))
    logging.info("wrote %s", path)

  def has_images(self, step: int, name: str) -> bool:
    """Whether this or an earlier start wrote that grid."""
    return self._grid(step, name).exists()

  def _grid(self, step: int, name: str) -> epath.Path:
    return self._directory / "samples" / f"{name}_{step:08d}.png"

  def flush(self) -> None:
    """Writes what is held back; a checkpoint must wait for it."""
    with workdir.writing(self._directory):
      for tracker in self._trackers:
        tracker.flush()

  def close(self) -> None:
    """Writes what is held back, and closes the trackers."""
    with workdir.writing(self._directory):
      for tracker in self._trackers:
        tracker.close()


def console_line(step: int, total: int, values: dict[str, float]) -> str:
  """What a person reads of a logging point; the files have all of it.

  Args:
    step: steps done.
    total: steps of the run.
    values: scalars of the logging point; those of `timing.StepClock` are
      missing before a step was timed.
  """
  parts = [f"step {step}/{total}", f"loss {values['loss']:.4g}"]
  if "seconds_per_step" in values:
    rate = values["images_per_second"]
    digits = ".3g" if rate < 100 else ".0f"
    parts.append(f"{rate:{digits}} images/s")
    waits = {name: values[f"share_{part}"] for part, name in _WAITS.items()}
    parts.append(
      " ".join(["waits:", *(f"{name} {x:.0%}" for name, x in waits.items())])
    )
    left = (total - step) * values["seconds_per_step"]
    parts.append(f"{progress.duration(left)} left")
  return ", ".join(parts)
