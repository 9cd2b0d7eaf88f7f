"""Many hosts: how the processes of one run find each other, and agree.

Every host runs the same program, and JAX's multi-controller runtime makes one
machine of them (`cluster` says which they are). All processes must take the
same branches. What one process alone can know, such as what a file holds, is
broadcast by `on_process_0`; what may fail in any of them, such as reading a
local file, goes through `on_all_processes`.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import secrets
import threading
import time
from typing import TypeVar
import zlib

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.parallel import platforms
from diffit_jax.parallel.cluster import Cluster, detect, has_tpu
from diffit_jax.stop import Stopped

__all__ = [
  "Cluster",
  "check_shared",
  "detect",
  "distributed",
  "has_tpu",
  "is_process_0",
  "log_error",
  "on_all_processes",
  "on_process_0",
  "preemption_notice",
  "use_compilation_cache",
]

T = TypeVar("T")
START_TIMEOUT = 1800  # seconds; the machines of a large slice come up slowly
HEARTBEAT_TIMEOUT = 100  # seconds of silence after which a process is dead
_SHUTDOWN_TIMEOUT = 60  # seconds to wait for the others at the end
_ZSTD = b"\x28\xb5\x2f\xfd"  # what it writes begins with
_SHARED_FOLDER_TIMEOUT = 10  # seconds; network folders may lag


@contextlib.contextmanager
def distributed(
  cluster: Cluster,
  timeout: int = START_TIMEOUT,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> Iterator[None]:
  """Joins the run's processes for the time of the block.

  An error that comes out of the block ends this process at once, so that the
  others notice, in place of waiting for them to end in good order. `Stopped` is
  no error: all processes stop together.

  Args:
    cluster: from `cluster.detect`.
    timeout: seconds to wait for all processes to come.
    heartbeat_timeout: seconds after which a process that gives no sign of life
      ends all the others, with JAX's words for it.

  Raises:
    UserError: they did not come, the devices that were asked for are not
      there, or something in the block failed.
  """
  if cluster.kind == "alone":
    platforms.wake()
    yield
    return
  _initialize(cluster, timeout, heartbeat_timeout)
  platforms.wake()
  logging.info(
    "process %d of %d: %d local devices, %d global devices",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )
  if not is_process_0():
    logging.set_verbosity(logging.WARNING)  # process 0 speaks for all
  stopped = None
  try:
    _connect_devices()
    yield
  except Stopped as reason:
    stopped = reason
  except Exception as error:
    if not isinstance(error, UserError):
      logging.error("process %d failed", jax.process_index(), exc_info=True)
      error = UserError(
        f"process {jax.process_index()} of {jax.process_count()} failed"
        f" ({type(error).__name__}: {_first_line(error)}); where another"
        " process ended first, its log says why; start all of them again"
      )
    if jax.process_index() == 0:
      time.sleep(1)  # the coordinator lives here: let the others speak first
    raise error from None
  try:
    jax.distributed.shutdown()
  except RuntimeError as error:
    logging.warning("another process did not end well: %s", _first_line(error))
  if stopped is not None:
    raise stopped


def _initialize(cluster: Cluster, timeout: int, heartbeat_timeout: int) -> None:
  # Without this JAX gives each of Slurm's tasks one GPU, even a node's only.
  method = None if cluster.coordinator is None else "deactivate"
  initialize = lambda: jax.distributed.initialize(
    cluster.coordinator,
    cluster.num_processes,
    cluster.process_id,
    cluster.device_ids,
    cluster_detection_method=method,
    initialization_timeout=timeout + 60,  # JAX's own end to it is an abort
    heartbeat_timeout_seconds=heartbeat_timeout,
    shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
  )
  try:
    _within(timeout, initialize)
  except (RuntimeError, ValueError, OSError) as error:
    hint = "" if cluster.coordinator else "; --num_processes=1 starts it alone"
    raise UserError(
      f"{cluster} did not find the others within --start_timeout={timeout}"
      f" seconds ({_first_line(error)}): are all processes started, and is the"
      f" coordinator's port open{hint}?"
    ) from error


def _connect_devices() -> None:
  """Lets all devices meet once, while all processes are here.

  The CPUs' Gloo gives them 30 seconds to, and after a compilation, some of
  which come from a cache, the processes may be further apart.
  """
  mesh = Mesh(np.array(jax.devices()), ("all",))
  sharding = NamedSharding(mesh, PartitionSpec("all"))
  ones = np.ones(jax.local_device_count(), np.float32)
  ones = jax.make_array_from_process_local_data(sharding, ones)
  jax.block_until_ready(jax.jit(jnp.sum)(ones))


def _within(seconds: float, call: Callable[[], object]) -> None:
  """Calls in a thread; a TimeoutError leaves it behind where it is late."""
  errors = []

  def run() -> None:
    try:
      call()
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  if thread.is_alive():
    raise TimeoutError("no answer")
  if errors:
    raise errors[0]


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [""])[0][:300]


def is_process_0() -> bool:
  """Whether this is process 0, which writes the files written once."""
  return jax.process_index() == 0


def log_error(error: Exception) -> None:
  """Logs the error with this process's number, if there are several."""
  if jax.process_count() > 1:
    logging.error("process %d: %s", jax.process_index(), error)


def preemption_notice() -> Callable[[int], bool] | None:
  """The function (step) -> whether all processes are to save it and stop.

  JAX catches SIGTERM in every process, and chooses a step that none has gone
  beyond. None where JAX has not been started for it: a run alone.
  """
  if not jax.distributed.is_initialized():
    return None
  return multihost_utils.reached_preemption_sync_point


def on_all_processes(call: Callable[[], T]) -> T:
  """Calls in every process; a UserError of one is raised in all of them."""
  if jax.process_count() == 1:
    return call()
  result, message = None, ""
  try:
    result = call()
  except UserError as error:
    message = str(error)
  messages = _gather_text(message)
  failed = [i for i, text in enumerate(messages) if text]
  if failed:
    where = "" if len(set(messages)) == 1 else f"process {failed[0]}: "
    raise UserError(where + messages[failed[0]])
  return result


def on_process_0(call: Callable[[], T]) -> T:
  """Calls in process 0 and broadcasts the result (as JSON) or the UserError."""
  if jax.process_count() == 1:
    return call()
  result, message = None, ""
  if is_process_0():
    try:
      result = call()
    except UserError as error:
      message = str(error)
  message, result = json.loads(_gather_text(json.dumps([message, result]))[0])
  if message:
    raise UserError(message)
  return result


def _gather_text(text: str) -> list[str]:
  """Every process's text, in every process."""
  data = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    bytes(row[:length]).decode() for row, length in zip(rows, lengths.ravel())
  ]


def check_same(what: str, text: str) -> None:
  """Refuses processes whose `text` differs from process 0's.

  Args:
    what: the text describes, as "config".
    text: what this process has.

  Raises:
    UserError: in all processes, naming the first that differs.
  """
  if jax.process_count() == 1:
    return
  texts = _gather_text(text)
  for i, other in enumerate(texts):
    if other != texts[0]:
      raise UserError(
        f"process {i} has another {what} than process 0: start all with the"
        " same command, config files and data sets"
      )


def check_shared(folder: str | os.PathLike) -> None:
  """Refuses a folder in which a process does not see process 0's files.

  Args:
    folder: local or gs://; created where missing.

  Raises:
    UserError: in all processes, where one of them cannot.
  """
  if jax.process_count() == 1:
    return
  token = on_process_0(lambda: secrets.token_hex(8))
  path = epath.Path(folder) / f".shared_folder_check_{token}"

  def write() -> None:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(token)
    except OSError as error:
      raise UserError(f"cannot write to {folder}: {error}") from error

  def read() -> None:
    deadline = time.monotonic() + _SHARED_FOLDER_TIMEOUT
    while not (path.exists() and path.read_text() == token):
      if time.monotonic() > deadline:
        raise UserError(
          f"{folder} is not shared: it lacks the file that process 0 wrote to"
          " it; use a folder that all hosts see, or a gs:// one"
        )
      time.sleep(0.2)

  on_process_0(write)
  try:
    on_all_processes(read)
  finally:
    if is_process_0():
      path.unlink(missing_ok=True)


def use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs in `folder`, unless JAX was told another.

  JAX_COMPILATION_CACHE_DIR wins. Process 0 writes, all read. JAX warns of a
  damaged entry and compiles again, but never writes it anew.
  """
  if jax.config.jax_compilation_cache_dir is None:
    if is_process_0():
      _drop_torn_entry(folder)
    jax.config.update("jax_compilation_cache_dir", folder)


def _drop_torn_entry(folder: str) -> None:
  """Deletes the newest entry where a kill came while it was written."""
  path = epath.Path(folder)
  if folder.startswith("gs://") or not path.is_dir():
    return  # objects in a bucket are whole or not there
  entries = [p for p in path.iterdir() if p.name.endswith("-cache")]
  entries.sort(key=lambda entry: entry.stat().mtime)
  for entry in entries[-1:]:
    try:
      _decompress(entry.read_bytes())
    except Exception:  # of whichever library compressed it
      logging.info("dropped %s, which a kill had cut short", entry)
      entry.unlink(missing_ok=True)


def _decompress(entry: bytes) -> bytes:
  """JAX compresses with zstandard where it is installed, or else with zlib."""
  if entry.startswith(_ZSTD):
    import zstandard

    return zstandard.ZstdDecompressor().decompress(entry)
  return zlib.decompress(entry)
