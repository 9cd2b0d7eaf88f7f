"""Where the time of training steps goes: logged always, traced on demand."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import sys
import tempfile
import time

from absl import logging
from etils import epath
import jax

from diffit_jax.errors import UserError
from diffit_jax.parallel import runtime
from diffit_jax.run import workdir

PARTS = ("data_wait", "checkpoint")


class StepClock:
  """Time per step since the last logging point, and what part of it waited.

  It only looks at the host's clock, so it never waits for the device. The rest
  of a step is the device's work, which the host waits for at logging points.
  """

  def __init__(self):
    self._start = None

  @property
  def is_running(self) -> bool:
    """False until `restart`: the first step compiles, and is not timed."""
    return self._start is not None

  def restart(self, step: int) -> None:
    """Begins to count anew, `step` steps being done."""
    self._start, self._step = time.monotonic(), step
    self._waited = dict.fromkeys(PARTS, 0.0)

  @contextlib.contextmanager
  def waiting(self, part: str) -> Iterator[None]:
    """Counts the block as waiting for `part`, one of PARTS."""
    start = time.monotonic()
    yield
    if self.is_running:
      self._waited[part] += time.monotonic() - start

  def scalars(self, step: int, batch_size: int) -> dict[str, float]:
    """Seconds per step and shares of it; nothing where no step was timed."""
    timed = step - self._step
    if not timed:
      return {}
    seconds = (time.monotonic() - self._start) / timed
    scalars = {
      "seconds_per_step": seconds,
      "images_per_second": batch_size / seconds,
    }
    for part, waited in self._waited.items():
      scalars[f"seconds_{part}"] = waited / timed
      scalars[f"share_{part}"] = waited / timed / seconds
    return scalars


def parse_steps(text: str | None) -> range:
  """The steps of --profile_steps=10:13, which are 10, 11 and 12.

  Raises:
    UserError: not of that form, or no steps.
  """
  if not text:
    return range(0)
  first, _, end = text.partition(":")
  try:
    steps = range(int(first), int(end))
  except ValueError:
    steps = range(0)
  if not steps or steps.start < 1:
    raise UserError(
      f"--profile_steps={text}: write FIRST:END, as 10:13 for the steps 10, 11"
      " and 12; steps count from 1"
    )
  return steps


class StepTrace:
  """Traces some steps of a run for TensorBoard's profile page and XProf.

  A trace is one folder, `<workdir>/plugins/profile/<time>`, with one
  `<host>.xplane.pb` (of several processes: `process_<i>.xplane.pb` each), which
  is where their plugin looks for it: `tensorboard --logdir=<workdir>`, `xprof
  <workdir>`. The profiler writes to the local disk, and the files go to the
  workdir from there.
  """

  def __init__(
    self,
    steps: range,
    directory: str | os.PathLike,
    patient: Callable[[], contextlib.AbstractContextManager],
  ):
    """Traces nothing yet; of several processes, each has to call this.

    Args:
      steps: counted as in the logs: step 1 is the run's first.
      directory: the workdir.
      patient: entered while the profiler starts or writes, which takes long.

    Raises:
      UserError: there are steps to trace, and this process cannot.
    """
    now = time.strftime("%Y_%m_%d_%H_%M_%S")
    self._time = runtime.on_process_0(lambda: now)
    if steps:
      _check_profiler()
    self._steps, self._patient = steps, patient
    self._directory = workdir.path_of(directory)
    self._local = None  # where the profiler writes while it is at work

  def before(self, step: int) -> None:
    """Starts the trace where `step`, about to be run, is one of them."""
    if self._local is None and step in self._steps:
      self._local = tempfile.TemporaryDirectory(prefix="trace_")
      with self._patient():
        options = jax.profiler.ProfileOptions()
        # Python's calls are not traced: where a save is under way, threads that
        # enter Python meanwhile can crash the process as such a trace ends.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._local.name, profiler_options=options)

  def after(self, step: int, state) -> None:
    """Ends the trace after the last of them, once `state` is computed."""
    if self._local is not None and step + 1 not in self._steps:
      with self._patient():
        jax.block_until_ready(state)
        self.close()

  def close(self) -> None:
    """Ends the trace if it is under way."""
    if self._local is not None:
      local, self._local = self._local, None
      with local:
        jax.profiler.stop_trace()
        self._publish(pathlib.Path(local.name))

  def _publish(self, local: pathlib.Path) -> None:
    """Puts what the profiler wrote into the trace's folder."""
    target = self._directory / "plugins" / "profile" / self._time
    several = jax.process_count() > 1  # which may share a host's name
    with workdir.writing(self._directory):
      target.mkdir(parents=True, exist_ok=True)
      for ending in ("xplane.pb", "trace.json.gz"):
        for file in local.glob(f"plugins/profile/*/*.{ending}"):
          name = f"process_{jax.process_index()}.{ending}"
          path = target / (name if several else file.name)
          epath.Path(file).copy(path, overwrite=True)
    logging.info("wrote a trace to %s", target)


def _check_profiler() -> None:
  """Without a TPU, libtpu's part of the profiler crashes the process."""
  platform = jax.default_backend()
  asked_for_tpus = not jax.config.jax_platforms  # as for all there are
  if "libtpu" in sys.modules and asked_for_tpus and platform != "tpu":
    raise UserError(
      "--profile_steps would crash: libtpu is installed, but this machine has"
      f" no TPU; set JAX_PLATFORMS={platform}"
    )
