"""Checkpoints: one Orbax step holds all of a run, as separate items.

  params, opt_state, ema   trees of arrays
  progress                 {"step": .., "data_position": ..}: small JSON

Sampling reads one EMA tree and never the optimizer. Restoring always goes
through an abstract tree with shardings, so any number of devices can read any
checkpoint. A step directory becomes visible only once complete (Orbax renames
it), so a kill during a save leaves the step before it as the newest.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from diffit_jax.errors import UserError
from diffit_jax.training.state import TrainState

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
  ):
    """Opens or creates the folder.

    Args:
      workdir: of the run.
      max_to_keep: newest checkpoints that stay.
      keep_period: a step divisible by it stays for ever; None for no such.
    """
    self.directory = pathlib.Path(os.path.abspath(workdir)) / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        keep_period=keep_period or None,
        cleanup_tmp_directories=True,
      ),
    )

  def save(self, step: int, state: TrainState, batch_size: int) -> None:
    """Starts saving `state`; returns once its arrays are copied to the host.

    Does nothing where the step is already saved. A failure of an earlier save
    in the background is raised here.

    Args:
      step: number of steps that `state` has taken.
      state: all of it but `state.step` is stored as arrays.
      batch_size: global, for the data position.
    """
    with _saving(step, self.directory):
      self._manager.check_for_errors()
      if step in self._manager.all_steps():
        return
      progress = {"step": step, "data_position": step * batch_size}
      self._manager.save(
        step,
        args=ocp.args.Composite(
          progress=ocp.args.JsonSave(progress),
          **{
            name: ocp.args.StandardSave(getattr(state, name)) for name in _TREES
          },
        ),
      )

  def check(self) -> None:
    """Raises the failure of a save in the background, if there was one."""
    with _saving(None, self.directory):
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for the save under way; raises its failure."""
    try:
      with _saving(None, self.directory):
        self._manager.wait_until_finished()
    except UserError:
      with contextlib.suppress(Exception):  # it would raise the same again
        self._manager.close()
      raise
    self._manager.close()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def restore(self, abstract: TrainState) -> TrainState | None:
    """The newest state that can be read, or None where there is none.

    A step that cannot be read is moved to `<workdir>/damaged`, with a warning,
    and the one before it is tried.

    Args:
      abstract: shapes, dtypes and shardings of the state to make.

    Raises:
      UserError: there are checkpoints, and none can be read.
    """
    failures = []
    for step in reversed(self.steps()):
      try:
        state = self._restore_step(step, abstract)
      except Exception as error:  # Orbax has no one class for damage
        failures.append((step, error))
        logging.error(
          "checkpoint %d cannot be read (%s: %s); trying the one before it",
          step,
          type(error).__name__,
          str(error).splitlines()[0][:300] if str(error) else "",
        )
        continue
      for damaged, _ in failures:
        self._set_aside(damaged)
      return state
    if failures:
      raise UserError(
        f"none of the checkpoints in {self.directory} can be read (steps"
        f" {[step for step, _ in failures]}; the newest: {failures[0][1]});"
        " nothing was changed; use another --workdir to start anew"
      )
    return None

  def _restore_step(self, step: int, abstract: TrainState) -> TrainState:
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        progress=ocp.args.JsonRestore(),
        **{
          name: ocp.args.StandardRestore(getattr(abstract, name))
          for name in _TREES
        },
      ),
    )
    if restored["progress"]["step"] != step:
      raise ValueError(f"folder {step} holds step {restored['progress']}")
    return TrainState(
      step=jax.device_put(np.int32(step), abstract.step.sharding),
      **{name: restored[name] for name in _TREES},
    )

  def _set_aside(self, step: int) -> None:
    target = self.directory.parent / "damaged" / str(step)
    target.parent.mkdir(exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(self.directory / str(step), target)
    logging.error("moved the damaged checkpoint %d to %s", step, target)
    self._manager.reload()


@contextlib.contextmanager
def _saving(step: int | None, directory: pathlib.Path) -> Iterator[None]:
  """Turns what the file system refuses while saving into one sentence."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    what = "a checkpoint" if step is None else f"checkpoint {step}"
    reason = str(error).split(": ")[-1].split(" [")[0][:200]  # not the paths
    raise UserError(
      f"saving {what} to {directory} failed: {reason}; older"
      " checkpoints are kept: free some space or mend the folder, then run"
      " the same command again"
    ) from error


def list_steps(workdir: str | os.PathLike) -> list[int]:
  """Complete steps in a workdir, oldest first, without opening a manager."""
  directory = pathlib.Path(workdir) / "checkpoints"
  if not directory.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory))


def restore_item(workdir: str | os.PathLike, step: int, item: str, abstract):
  """Reads one item ("params" or "ema") of one step, and nothing else.

  Args:
    workdir: of the run.
    step: one of `list_steps`.
    item: its name.
    abstract: shapes, dtypes and shardings to restore into.
  """
  path = pathlib.Path(os.path.abspath(workdir)) / "checkpoints" / str(step)
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path / item, abstract)
