"""Where the metrics of a run go: rows of one table, by `config.trackers`.

A row opens a tracker for a workdir and a config. TensorBoard's files are part
of the workdir, and what stops those stops the run, as it stops checkpoints. Any
other tracker never stops a run: it is warned of at its first error, and then
left alone.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib.util
import os
import secrets
from typing import Any, Protocol

from absl import logging
from etils import epath
import numpy as np

from diffit_jax import pictures
from diffit_jax.errors import UserError
from diffit_jax.run import buckets, workdir
from diffit_jax.training import events

DEFAULT = ("tensorboard",)  # of configs that have no such field
PROJECT = "diffit_jax"


class Tracker(Protocol):
  """One place where metrics go; only process 0 has any."""

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of one step."""

  def images(self, step: int, name: str, grid: np.ndarray) -> None:
    """Writes uint8 [h, w, c], a grid of samples."""

  def text(self, name: str, content: str) -> None:
    """Writes a text that the workdir has as a file of that name."""

  def flush(self) -> None:
    """Writes what is held back; a checkpoint waits for it."""

  def close(self) -> None:
    """Ends the run, as far as this start of it goes."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A kind of tracker.

  Attributes:
    open: (workdir, config) -> tracker.
    package: which must be installed, and is an extra of the same name; "" for
      one that is there anyway, in the workdir.
  """

  open: Callable[[epath.Path, Mapping], Tracker]
  package: str = ""


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run of W&B or of Trackio, whose interfaces are alike.

  Attributes:
    log: (step, {name: value}) -> None.
    image: makes a value of a picture.
    finish: sends the rest.
  """

  log: Callable[[int, dict[str, Any]], None]
  image: Callable[[Any], Any]
  finish: Callable[[], None]

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self.log(step, values)

  def images(self, step: int, name: str, grid: np.ndarray) -> None:
    self.log(step, {name: self.image(pictures.to_image(grid))})

  def text(self, name: str, content: str) -> None:
    """Does nothing: the file in the workdir is the one place of it."""

  def flush(self) -> None:
    """Does nothing: both send in the background."""

  def close(self) -> None:
    self.finish()


def _open_wandb(directory: epath.Path, config: Mapping) -> Tracker:
  import wandb

  run = wandb.init(
    project=os.environ.get("WANDB_PROJECT", PROJECT),
    name=config["name"],
    id=_run_id(directory),
    resume="allow",
    dir=None if buckets.is_bucket(directory) else os.fspath(directory),
    config=config.to_dict(),
    settings=wandb.Settings(console="off"),  # the log is ours
  )
  # W&B refuses steps before its last; a run goes back to its last checkpoint.
  run.define_metric("*", step_metric="step")
  log = lambda step, values: run.log({**values, "step": step})
  return _Run(log, wandb.Image, run.finish)


def _open_trackio(directory: epath.Path, config: Mapping) -> Tracker:
  import trackio

  run = trackio.init(
    project=PROJECT,
    name=f"{config['name']}-{_run_id(directory)}",
    resume="allow",
    config=config.to_dict(),
    embed=False,
  )
  log = lambda step, values: run.log(values, step=step)
  return _Run(log, trackio.Image, trackio.finish)


TRACKERS = {
  "tensorboard": Row(lambda path, _: events.EventWriter(path / "tensorboard")),
  "wandb": Row(_open_wandb, "wandb"),
  "trackio": Row(_open_trackio, "trackio"),
}


def _run_id(directory: epath.Path) -> str:
  """What trackers know a run by: the same at every start of it."""
  path = directory / "tracker_id.txt"
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_whole(path, secrets.token_hex(4).encode())
  return path.read_text().strip()


class _Guarded:
  """A tracker whose first error is warned of, and which is then left alone.

  It is opened when something is written: a start that finds the run done opens
  none.
  """

  def __init__(self, name: str, open_tracker: Callable[[], Tracker]):
    self._name, self._open = name, open_tracker
    self._tracker, self._has_failed = None, False

  def _call(self, method: str, *args) -> None:
    is_idle = self._tracker is None and method in ("flush", "close")
    if self._has_failed or is_idle:
      return
    try:
      self._tracker = self._tracker or self._open()
      getattr(self._tracker, method)(*args)
    except Exception as error:
      self._has_failed = True
      logging.warning(
        "the tracker %s failed and is left alone until the next start; training"
        " goes on: %s",
        self._name,
        buckets.first_line(error),
      )

  scalars = functools.partialmethod(_call, "scalars")
  images = functools.partialmethod(_call, "images")
  text = functools.partialmethod(_call, "text")
  flush = functools.partialmethod(_call, "flush")
  close = functools.partialmethod(_call, "close")


def _names(config: Mapping) -> tuple[str, ...]:
  return tuple(config.get("trackers", DEFAULT))


def check(config: Mapping) -> None:
  """Refuses trackers that there are not, or whose package is not installed.

  Raises:
    UserError: names what there is, or the package.
  """
  for name in _names(config):
    if name not in TRACKERS:
      raise UserError(
        f"trackers={_names(config)}: there is no {name!r}, only"
        f" {', '.join(TRACKERS)}; two are written"
        " --config.trackers=\"('tensorboard','wandb')\""
      )
    package = TRACKERS[name].package
    if package and importlib.util.find_spec(package) is None:
      raise UserError(
        f"trackers={name} needs {package}: pip install 'diffit_jax[{package}]',"
        f" or '.[{package}]' in a checkout"
      )


def open_all(directory: epath.Path, config: Mapping) -> list[Tracker]:
  """The trackers of a config; to be called in process 0 only."""
  found = []
  for name in _names(config):
    row = TRACKERS[name]
    start = functools.partial(row.open, directory, config)
    found.append(_Guarded(name, start) if row.package else start())
  return found
