"""Checkpoints: one Orbax step holds all of a run, as separate items.

  params, opt_state, ema   trees of arrays
  progress                 {"step": .., "data_position": ..}: small JSON
  last_log                 {"loss": ..}: metrics of the last logging point
  checksums                of every leaf of all that

Sampling reads one EMA tree and never the optimizer. See `storage` for how a
step is written and read. A step that cannot be read, or whose checksums differ,
is set aside and the one before it is taken.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
from typing import TypeVar

from absl import logging
import jax
import numpy as np
from orbax.checkpoint import checkpoint_managers as orbax_policies

from diffit_jax.errors import UserError
from diffit_jax.parallel.sharding import place
from diffit_jax.run import storage
from diffit_jax.run.state import TrainState

T = TypeVar("T")
_TREES = ("params", "opt_state", "ema")


class Checkpoints:
  """The checkpoints of one workdir.

  Attributes:
    directory: `<workdir>/checkpoints`, one folder per kept step.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    max_to_keep: int = 3,
    keep_period: int | None = None,
    best_by: str = "",
  ):
    """Opens or creates the folder.

    Args:
      workdir: folder of the run.
      max_to_keep: newest checkpoints that stay.
      keep_period: a step divisible by it stays for ever; None or 0 for no such.
      best_by: name of a metric that `save` or `note` will tell; the
        checkpoint with the least of it stays until one with less is saved. ""
        for no such.
    """
    self.directory = storage.checkpoints(workdir)
    policies = [orbax_policies.LatestN(max_to_keep)]
    if keep_period:
      policies.append(orbax_policies.EveryNSteps(keep_period))
    self._best = None
    if best_by:
      self._best = KeepBest(best_by, self._read_metrics)
      policies.append(self._best)
    policy = orbax_policies.AnyPreservationPolicy(policies)
    self._folder = storage.StepFolder(self.directory, policy, "checkpoint")

  def check(self) -> None:
    """Raises the failure of a save in the background; cheap in every step."""
    self._folder.check()

  def close(self) -> None:
    """Waits for the save under way; raises its failure."""
    self._folder.close()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return self._folder.steps()

  def save(
    self,
    step: int,
    state: TrainState,
    batch_size: int,
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts saving `state`; returns once its arrays are copied to the host.

    Does nothing where the step is already saved. A failure of an earlier save
    in the background is raised here.

    Args:
      step: number of steps that `state` has taken.
      state: all of it but `state.step` is stored as arrays.
      batch_size: global, for the data position.
      metrics: metrics of the last logging point.
    """
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    if self._best is not None and step not in self.steps():
      self._best.add(step, metrics)
    self._folder.save(
      step,
      {name: getattr(state, name) for name in _TREES},
      {
        "progress": {"step": step, "data_position": step * batch_size},
        "last_log": metrics,
      },
      unit=jax.tree.structure(state.params),
    )

  def note(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds what became known of a step after it was saved."""
    if self._best is not None:
      self._best.note(step, metrics)

  def restore(self, abstract: TrainState) -> TrainState | None:
    """The newest state that can be read, or None where there is none.

    A step that cannot be read is moved to `<workdir>/damaged`, with a warning,
    and the one before it is tried.

    Args:
      abstract: shapes, dtypes and shardings of the state to make.

    Raises:
      UserError: there are checkpoints, and none can be read.
    """
    state, failures = read_newest(
      self.steps(), lambda step: self._restore_step(step, abstract)
    )
    if state is not None and failures:
      self._folder.set_aside([*failures], self.directory.parent / "damaged")
    elif failures:
      raise UserError(
        f"none of the checkpoints in {self.directory} can be read (steps"
        f" {[*failures]}; the newest: {next(iter(failures.values()))});"
        " nothing was changed; use another --workdir to start anew"
      )
    return state

  def _restore_step(self, step: int, abstract: TrainState) -> TrainState:
    found = storage.read(
      self.directory,
      step,
      {name: getattr(abstract, name) for name in _TREES},
      notes=("progress",),
      unit=jax.tree.structure(abstract.params),
    )
    if found["progress"]["step"] != step:
      raise UserError(f"folder {step} holds step {found['progress']}")
    return TrainState(
      step=place(np.int32(step), abstract.step.sharding),
      **{name: found[name] for name in _TREES},
    )

  def _read_metrics(self, step: int) -> dict:
    try:
      return dict(storage.read_note(self.directory, step, "last_log"))
    except (OSError, ValueError, TypeError):
      return {}  # a damaged checkpoint is the best by nothing


class KeepBest(orbax_policies.PreservationPolicy):
  """Keeps the one step whose metric is the least; never one without it."""

  def __init__(self, name: str, read):
    """`read` gives the metrics of a step of an earlier start."""
    self._name, self._read = name, read
    self._values: dict[int, float] = {}

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes the metrics of a step that is about to be saved."""
    value = metrics.get(self._name, math.nan)
    number = isinstance(value, float) and math.isfinite(value)
    self._values[step] = value if number else math.inf

  def note(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds the metric of a step that was saved without it."""
    if self._name in metrics:
      self.add(step, metrics)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """True for the best of `checkpoints`; see Orbax."""
    for info in checkpoints:
      if info.step not in self._values:
        self.add(info.step, self._read(info.step))
    values = [self._values[info.step] for info in checkpoints]
    best = min(values, default=math.inf)
    first = values.index(best) if math.isfinite(best) else -1
    return [i == first for i in range(len(values))]


def read_newest(
  steps: Sequence[int], read: Callable[[int], T]
) -> tuple[T | None, dict[int, UserError]]:
  """What `read` gives of the newest step that can be read; None for none.

  Args:
    steps: the steps, oldest first.
    read: reads one of them, and raises UserError where it cannot be.

  Returns:
    (result, {step: why it cannot be read} of the newer ones).
  """
  failures = {}
  for step in reversed(steps):
    try:
      return read(step), failures
    except UserError as error:
      failures[step] = error
      logging.error(
        "checkpoint %d cannot be read (%s); trying the one before it",
        step,
        error,
      )
  return None, failures


def list_steps(workdir: str | os.PathLike) -> list[int]:
  """Complete steps in a workdir, oldest first, without opening a manager."""
  return storage.list_steps(storage.checkpoints(workdir))


def restore_item(workdir: str | os.PathLike, step: int, item: str, abstract):
  """Reads one item ("params" or "ema") of one step, and nothing else.

  Args:
    workdir: folder of the run.
    step: one of `list_steps`.
    item: its name.
    abstract: shapes, dtypes and shardings to restore into; of "ema" it may name
      some of the averages only.

  Raises:
    UserError: it cannot be read; names the leaf where one is damaged.
  """
  directory = storage.checkpoints(workdir)
  unit = None
  if item == "ema":
    unit = jax.tree.structure(next(iter(abstract.values())))
  found = storage.read(
    directory, step, {item: abstract}, partial=item == "ema", unit=unit
  )
  return found[item]
