"""A folder of numbered Orbax steps: trees of arrays, notes, and checksums.

  <directory>/<step>/<tree>      one Orbax item per tree of arrays
  <directory>/<step>/<note>      small JSON
  <directory>/<step>/checksums   {"params/a/kernel": "<16 hex digits>", ..}

A step becomes visible only once complete (Orbax renames it, or in a bucket
marks it), so a kill during a save leaves the step before it as the newest.
Saving copies the arrays to the host and writes them in the background. Reading
goes through an abstract tree with shardings, so any number of devices and
processes can read any step, and compares the checksums of every leaf.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import json
import os
import time
from typing import TypeVar

from absl import logging
from etils import epath
import orbax.checkpoint as ocp

from diffit_jax.errors import UserError
from diffit_jax.parallel import runtime
from diffit_jax.run import buckets, integrity

T = TypeVar("T")
_SUMS = "checksums"
_LAG = 60  # seconds by which the listing of a network folder may lag
_RETRIES = (1, 5)  # seconds to wait before what may pass is tried again
_MAY_PASS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, which leaves JAX's preemption counter alone.

  Its own use, in a thread and with steps of the past, would set the counter
  back on process 0 only, and the processes would not agree on where to stop.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


class StepFolder:
  """Writes the steps of one folder.

  Attributes:
    directory: one folder per kept step.
  """

  def __init__(
    self,
    directory: epath.Path,
    policy: ocp.checkpoint_managers.PreservationPolicy,
    kind: str,
  ):
    """Opens or creates the folder, and removes what a kill left half-written.

    Args:
      directory: absolute.
      policy: says which steps stay after a save.
      kind: what a step is called in error messages.
    """
    self.directory, self._kind = directory, kind
    self._is_pending = False
    self._manager = _Manager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        cleanup_tmp_directories=True,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          barrier_sync_key_prefix=directory.name
        ),
      ),
    )

  def save(self, step: int, trees: Mapping, notes: Mapping, unit=None) -> None:
    """Starts saving; returns once the arrays are copied to the host.

    Does nothing where the step is already there. A failure of an earlier save
    in the background is raised here.

    Args:
      step: number of steps taken.
      trees: {name: tree of arrays}.
      notes: {name: what JSON can hold}.
      unit: see `integrity.checksums`.
    """
    self.check()
    # Process 0's view, since listings of network folders may lag.
    if runtime.on_process_0(lambda: step in self._manager.all_steps()):
      return
    sums = integrity.checksums(dict(trees), unit)
    sums |= {name: _digest(note) for name, note in notes.items()}
    items = {
      **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
      **{name: ocp.args.JsonSave(note) for name, note in notes.items()},
      _SUMS: ocp.args.JsonSave(sums),
    }
    with self._saving(step):
      # Forced, as Orbax keeps no step below the newest one otherwise.
      self._manager.save(step, args=ocp.args.Composite(**items), force=True)
    self._is_pending = True

  def check(self) -> None:
    """Raises the failure of a save in the background; cheap in every step."""
    if self._is_pending and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save under way; raises its failure."""
    if self._is_pending:
      self._is_pending = False
      with self._saving(None):
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits as `wait`, and ends the threads in any case."""
    try:
      self.wait()
    except UserError:
      with contextlib.suppress(Exception):  # it would raise the same again
        self._manager.close()
      raise
    self._manager.close()

  def steps(self) -> list[int]:
    """All complete steps, oldest first; all processes call it together."""
    return runtime.on_process_0(lambda: sorted(self._manager.all_steps()))

  def set_aside(self, steps: list[int], folder: epath.Path) -> None:
    """Moves damaged steps into `folder`; all processes call it together."""

    def move() -> None:
      for step in steps:
        source, target = self.directory / str(step), folder / str(step)
        try:
          folder.mkdir(parents=True, exist_ok=True)
          if target.exists():
            target.rmtree()
          source.rename(target)
        except buckets.failures(self.directory) as error:
          raise UserError(
            f"cannot move the damaged {source} to {target} ({error}): move or"
            " delete it, then run the same command again"
          ) from error
        logging.error("moved the damaged step %d to %s", step, target)

    def reload() -> None:
      deadline = time.monotonic() + _LAG
      while any((self.directory / str(step)).exists() for step in steps):
        if time.monotonic() > deadline:
          raise UserError(
            f"steps {steps} were moved out of {self.directory}, and can still"
            " be seen: run the same command again"
          )
        time.sleep(0.2)
      self._manager.reload()

    # No process looks at the folder while another one changes it.
    runtime.on_process_0(move)
    runtime.on_all_processes(reload)

  @contextlib.contextmanager
  def _saving(self, step: int | None) -> Iterator[None]:
    """Turns what the file system refuses while saving into one sentence."""
    try:
      yield
    except (
      *buckets.failures(self.directory),
      ValueError,
      RuntimeError,
    ) as error:
      what = f"a {self._kind}" if step is None else f"{self._kind} {step}"
      reason = str(error).split(": ")[-1].split(" [")[0][:200]  # not the paths
      raise UserError(
        f"saving {what} to {self.directory} failed: {reason}; older"
        f" {self._kind}s are kept: free some space or mend the folder, then run"
        " the same command again"
      ) from error


def absolute(path: str | os.PathLike) -> epath.Path:
  """The path as Orbax needs it; buckets (gs://) are absolute already."""
  text = os.fspath(path)
  return epath.Path(text if "://" in text else os.path.abspath(text))


def checkpoints(workdir: str | os.PathLike) -> epath.Path:
  """The folder of a workdir's checkpoints."""
  return absolute(workdir) / "checkpoints"


def check_name(path: str | os.PathLike) -> None:
  """Refuses a folder from which no step could be read again.

  Orbax joins the parts of a step that it finds by the pattern `<absolute
  path>/ocdbt.process_*`, and only warns where it finds none. Reading takes the
  path as it is.

  Args:
    path: folder that steps are to be saved in.
  """
  full = str(absolute(path))
  found = sorted(set(full) & set("*?["))
  if found:
    raise UserError(
      f"cannot train in {full}: {' and '.join(found)} is taken for a pattern"
      " when checkpoints are saved, and none could be read again; use a"
      " --workdir whose whole path has no * ? ["
    )


def list_steps(directory: epath.Path) -> list[int]:
  """Complete steps, oldest first, of a folder that may be missing."""
  if not directory.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory))


def read_note(directory: epath.Path, step: int, name: str):
  """One note of a step, unchecked; any failure is the caller's."""
  path = directory / str(step) / name / "metadata"
  return json.loads(_persist(path.read_text))


def read(
  directory: epath.Path,
  step: int,
  trees: Mapping,
  notes: tuple[str, ...] = (),
  *,
  partial: bool = False,
  unit=None,
) -> dict:
  """Trees and notes of one step, each as it was saved or not at all.

  All processes call it together, and all get them or none.

  Args:
    directory: folder of the steps.
    step: one of `list_steps`.
    trees: {name: shapes, dtypes and shardings to restore into}.
    notes: names of the JSON to read.
    partial: the trees may be a part of what was saved under their names.
    unit: see `integrity.checksums`.

  Returns:
    {name: tree or note}.

  Raises:
    UserError: says what cannot be read, or which leaf is damaged.
  """

  def load_once():
    sums = read_note(directory, step, _SUMS)
    found = {name: read_note(directory, step, name) for name in notes}
    integrity.compare(sums, {k: _digest(v) for k, v in found.items()})
    for name, abstract in trees.items():
      path = directory / str(step) / name
      found[name] = _load_tree(path, abstract, partial)
    return sums, found

  def load():
    try:
      return _persist(load_once)
    except Exception as error:  # Orbax has no one class for damage
      first = (str(error).splitlines() or [""])[0][:300]
      raise UserError(f"{type(error).__name__}: {first}") from error

  # No process may be left waiting for another one that failed to read, so
  # nothing in `load` communicates, and all processes come to the checksums.
  sums, found = runtime.on_all_processes(load)
  read_sums = integrity.checksums({name: found[name] for name in trees}, unit)
  try:
    integrity.compare(sums, read_sums)
  except integrity.Damage as damage:
    raise UserError(str(damage)) from damage
  return found


def _persist(call: Callable[[], T]) -> T:
  """`call()`, tried again where a network file system may have failed it."""
  for seconds in _RETRIES:
    try:
      return call()
    except Exception as error:
      is_gone = isinstance(error, FileNotFoundError)
      may_pass = isinstance(error, OSError) and not is_gone
      if not may_pass and not any(code in str(error) for code in _MAY_PASS):
        raise
      logging.warning("cannot read (%s): again in %d s", error, seconds)
      time.sleep(seconds)
  return call()


def _load_tree(path: epath.Path, abstract, partial: bool):
  """One tree, by a handler that waits for no other process."""
  if not partial:
    return ocp.StandardCheckpointHandler().restore(
      path, args=ocp.args.StandardRestore(abstract)
    )
  restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
  return ocp.PyTreeCheckpointHandler().restore(
    path,
    args=ocp.args.PyTreeRestore(
      item=abstract, restore_args=restore_args, partial_restore=True
    ),
  )


def _digest(note) -> str:
  """16 hexadecimal digits of a note."""
  text = json.dumps(note, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
