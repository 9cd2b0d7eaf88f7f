"""Runs an extractor over batches of images, on all devices of all hosts.

Each batch is split over the mesh, and its features (20 KB an image) come back
whole to every process, which adds them up in float64, in order. So the number
of devices or processes changes nothing but the rounding of the network itself.
Rows beyond the last image are dropped on the way.

With a partial file, what was gathered is kept every few minutes and at SIGTERM,
and the same call continues from it, to the same bits.
"""

from collections.abc import Callable, Mapping
import itertools
import json
import pathlib
import re
import time
import zipfile

from absl import logging
import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax import whole
from diffit_jax.errors import UserError
from diffit_jax.evaluation.features.extractor import Extractor
from diffit_jax.evaluation.metrics.statistics import FeatureStatistics
from diffit_jax.evaluation.sets.batches import Batches
from diffit_jax.parallel import runtime
from diffit_jax.parallel.mesh import check_batch
from diffit_jax.parallel.sharding import batch_sharding, place, replicated
from diffit_jax.progress import Progress
from diffit_jax.stop import Stopped, StopRequest

_SAVE_SECONDS = 120


def asking(stop: StopRequest) -> Callable[[], bool]:
  """The `should_stop` of a program whose steps are the collector's batches."""
  steps = itertools.count(1)

  def should_stop() -> bool:
    stop.at_step(next(steps))
    return stop.requested

  return should_stop


class Collector:
  """An extractor on a mesh.

  Attributes:
    extractor: what makes the features.
    mesh: the devices.
    check_claim: called before a file is written, in the process that writes;
      raises a UserError if another process has taken the place.
  """

  def __init__(
    self,
    extractor: Extractor,
    mesh: Mesh,
    *,
    batch_size: int = 64,
    should_stop: Callable[[], bool] = lambda: False,
    check_claim: Callable[[], None] = lambda: None,
  ):
    """Copies the extractor's weights to the devices.

    Args:
      extractor: what makes the features.
      mesh: the devices.
      batch_size: images per call, over all devices; rounded up to fill them.
      should_stop: asked after every batch; answers the same in all processes.
      check_claim: see the class.
    """
    self.extractor, self.mesh = extractor, mesh
    self.check_claim = check_claim
    self._batch_size = -(-batch_size // mesh.size) * mesh.size
    check_batch(mesh, self._batch_size, "batch_size")
    self._should_stop = should_stop
    whole = replicated(mesh)
    self._params = jax.tree.map(lambda x: place(x, whole), extractor.params)
    self._run = jax.jit(
      extractor.apply,
      in_shardings=(whole, batch_sharding(mesh)),
      out_shardings=whole,
    )

  def collect(
    self,
    batches: Batches,
    source: str,
    *,
    held: np.ndarray | None,
    stem: pathlib.Path | None,
    what: str,
    settings: Mapping,
  ) -> FeatureStatistics:
    """Statistics of all images of `batches`.

    Args:
      batches: the images.
      source: name of the set, for the progress display.
      held: sorted indices of the images whose features are kept; None for all.
      stem: path that the partial file's name begins with; None for no file.
      what: part of the partial file's name, as `remove_partial` knows it.
      settings: JSON-able; a partial file of other settings is ignored.

    Raises:
      Stopped: SIGTERM came first.
    """
    gathered = FeatureStatistics(held)
    partial = _PartialFile(
      stem and stem.with_name(f"{stem.name}.{what}.partial"),
      {**settings, "extractor": dict(self.extractor.card_entry)},
      self.check_claim,
    )
    partial.load(gathered)
    progress = Progress(
      batches.num,
      f"features of {source}",
      "images",
      gathered.num,
      quiet=not runtime.is_process_0(),
    )
    with progress:
      waiting = None  # one batch ahead: the devices work while this adds
      for start in range(gathered.num, batches.num, self._batch_size):
        images = batches.get(start, self._batch_size)
        features = self._run(self._params, images)
        if waiting:
          self._add(waiting, batches, gathered, partial, progress)
        waiting = features
      if waiting:
        self._add(waiting, batches, gathered, partial, progress)
    batches.finish()
    partial.save(gathered)  # what follows may be stopped, too
    return gathered

  def _add(self, features, batches, gathered, partial, progress) -> None:
    wanted = min(self._batch_size, batches.num - gathered.num)
    found = {name: np.asarray(x)[:wanted] for name, x in features.items()}
    bad = [name for name, x in found.items() if not np.isfinite(x).all()]
    if bad:
      raise UserError(
        f"features ({', '.join(bad)}) of images {gathered.num} to"
        f" {gathered.num + wanted - 1} are not finite: the weights of the"
        f" {self.extractor.name} network are damaged or not what they should be"
      )
    gathered.update(found)
    progress.update(wanted)
    if self._should_stop() and gathered.num < batches.num:
      partial.save(gathered)
      raise Stopped
    partial.save_now_and_then(gathered)


class _PartialFile:
  """What was gathered so far, with the settings that it was gathered under."""

  def __init__(
    self,
    path: pathlib.Path | None,
    settings: Mapping,
    check_claim: Callable[[], None],
  ):
    """Reads and writes nothing yet; with no path, never."""
    self._path, self._check_claim = path, check_claim
    self._settings = json.dumps(settings, sort_keys=True)
    self._saved_at = time.monotonic()

  def load(self, gathered: FeatureStatistics) -> None:
    """Continues from the file, in all processes or in none."""
    if self._path is None:
      return
    state = self._read()
    num = int(state["num"]) if state else 0
    try:
      runtime.check_same("partial result", str(num))
    except UserError:
      return
    if num:
      logging.info("going on from %s, %d images", self._path, num)
      gathered.restore(state)

  def _read(self) -> dict[str, np.ndarray]:
    try:
      with np.load(self._path, allow_pickle=False) as file:
        if str(file["settings"]) != self._settings:
          return {}
        return {name: file[name] for name in file.files}
    except FileNotFoundError:
      return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      logging.warning("%s is damaged: starting anew", self._path)
      return {}

  def save_now_and_then(self, gathered: FeatureStatistics) -> None:
    """Saves if the last save was some time ago."""
    if time.monotonic() - self._saved_at > _SAVE_SECONDS:
      self.save(gathered)

  def save(self, gathered: FeatureStatistics) -> None:
    """Replaces the file: by the whole new one, or not at all."""
    self._saved_at = time.monotonic()
    if self._path is None or not runtime.is_process_0():
      return
    self._check_claim()
    try:
      with whole.writing(self._path) as new, new.open("wb") as file:
        np.savez(file, settings=self._settings, **gathered.state())
    except OSError as error:
      raise UserError(
        f"cannot write {self._path}: {error}; free some space, then run the"
        " same command again"
      ) from error


def remove_partial(stem: pathlib.Path) -> None:
  """Deletes the partial files of a stem, when the result is written."""
  if not runtime.is_process_0():
    return
  ours = re.compile(rf"{re.escape(stem.name)}\.(reference|samples\d+)\.partial")
  for path in stem.parent.iterdir():
    if ours.fullmatch(path.name):
      path.unlink(missing_ok=True)
