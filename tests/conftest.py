"""Eight fake CPU devices for every test, and one compilation cache.

Both are set before jax is imported. The cache is new in every session; it saves
compiling one program again for each of the many runs that the tests start.
"""

import atexit
import fcntl
import gc
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# Each worker of xdist has a core, whose time waiting threads would take.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _cache = tempfile.mkdtemp(prefix="diffit_jax_tests_")
  atexit.register(shutil.rmtree, _cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Programs in the compiler's own form carry the Python stack of every operation,
# up to 100 frames, of which most are pytest's.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# The packages are installed without bytecode (see Makefile): every program that
# a test starts would compile again the thousand modules that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What a shell starts in the background ignores SIGINT, and so would programs
# that tests start and then stop by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

gc.set_threshold(100_000)  # as the commands do

import pytest  # noqa: E402

from commands import FEWER_EMITTERS  # noqa: E402

# Begun first, so that both workers of xdist end at about the same time.
LONG_FILES = (
  "test_readme.py",  # whose commands others look at
  "test_experiments.py",
  "test_two_processes.py",
  "test_commands.py",
  "test_kill.py",
  "test_loop.py",
  "test_evaluate_commands.py",
  "test_latent_commands.py",
  "test_launch.py",
  "test_placement.py",
  "test_checkpoint.py",
  "test_plan.py",
  *("test_networks.py", "test_samples.py", "test_run.py"),  # of the page
)


def pytest_configure(config):
  """Tests compile much and compute little: XLA is not to optimise.

  Slow tests are real runs, and time the compiler: there it is to.
  """
  if config.option.markexpr.startswith("not slow"):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["XLA_FLAGS"] += f" {FEWER_EMITTERS}"


def pytest_collection_modifyitems(items):
  """Puts the long files first (needs --no-loadscope-reorder)."""
  place = {name: i for i, name in enumerate(LONG_FILES)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def _is_worker(config) -> bool:
  """Of xdist. Its variables are those of a pytest that a test starts, too."""
  return hasattr(config, "workerinput")


def pytest_sessionfinish(session):
  """Ends at once: there is a heap to look through and JAX's caches to empty.

  That takes each worker of xdist some five seconds.
  """
  gc.freeze()
  if _is_worker(session.config):
    atexit.register(os._exit, 0)  # the last to be registered is the first


@pytest.fixture
def x64():
  """Float64 wherever a test asks for it."""
  import jax

  with jax.enable_x64(True):
    yield


def _once(config, tmp_path_factory, name: str, make):
  """A folder that the first worker of xdist that asks for it fills for all.

  Args:
    config: pytest's.
    tmp_path_factory: pytest's.
    name: of the folder.
    make: fills an empty folder.
  """
  base = tmp_path_factory.getbasetemp()
  if _is_worker(config):
    base = base.parent
  folder, done = base / name, base / f"{name}.done"
  with open(base / f"{name}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      shutil.rmtree(folder, ignore_errors=True)
      folder.mkdir()
      make(folder)
      done.touch()
  return folder


@pytest.fixture(scope="session")
def data_dir(pytestconfig, tmp_path_factory) -> str:
  """A data directory with the prepared digits."""
  from diffit_jax.data import preparation
  from diffit_jax.data.builders import digits

  make = lambda folder: preparation.prepare(
    **digits.recipe(), data_dir=str(folder)
  )
  return str(_once(pytestconfig, tmp_path_factory, "data", make))


@pytest.fixture(scope="session")
def digits_run(data_dir, pytestconfig, tmp_path_factory):
  """The workdir of a finished debug run of `main` on the digits, to be read."""
  import commands

  make = lambda folder: commands.succeed(
    f"main --config=configs/digits.py:debug --workdir={folder}"
    f" --data_dir={data_dir} --profile_steps=3:5"
  )
  return _once(pytestconfig, tmp_path_factory, "digits_run", make)


@pytest.fixture(scope="session")
def readme(pytestconfig, tmp_path_factory):
  """The folder in which the README's commands ran; to be read."""
  import readme_run

  return _once(pytestconfig, tmp_path_factory, "readme", readme_run.run_all)
