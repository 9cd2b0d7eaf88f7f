"""Runs the project's commands as a user would: in a process of their own.

Most of a small command's time goes into imports. What can is therefore forked
from a process that has them behind it (`command_server.py`). Where PYTHONPATH
or anything else that imports may depend on is set, an interpreter starts anew.
"""

import functools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile

import jaxlib

# Without its MLIR emitters, XLA for CPU compiles the same program in a sixth to
# six tenths of the time, and with narrow vectors and in one thread in four
# fifths of that. From jaxlib 0.11 on it does not know the first flag, and an
# unknown one ends the process; the others then save nothing.
_HAS_EMITTERS = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
FEWER_EMITTERS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_prefer_vector_width=128"
  " --xla_cpu_parallel_codegen_split_count=1"
) * _HAS_EMITTERS
# For jax.jit, where rounding is compared to the last bits.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if _HAS_EMITTERS else {}
# Tests compile much and compute little: do not optimise.
FAST_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  f" {FEWER_EMITTERS}"
)
ROOT = pathlib.Path(__file__).parent.parent
PYTHON_PATH = f"{ROOT}:{ROOT / 'tests'}"  # of programs that import from tests/
_READ_AFTER_IMPORTS = {
  *("XLA_FLAGS", "TFDS_DATA_DIR"),
  *("HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HF_HUB_DISABLE_XET"),
}


def _environment() -> dict[str, str]:
  return {**os.environ, "XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}


def start(command: str, cwd=ROOT, **env) -> "Forked | subprocess.Popen":
  """Starts `python -m diffit_jax.<command>` on one CPU device."""
  return start_python(["-m", *f"diffit_jax.{command}".split()], cwd, env)


def start_python(
  command: list[str], cwd=ROOT, env: dict[str, str | None] | None = None
) -> "Forked | subprocess.Popen":
  """Starts `python <command>`: -m MODULE, -c CODE or FILE, and arguments.

  Files and code may import from tests/. A variable of `env` that is None is
  taken away.
  """
  env = env or {}
  path = {} if command[0] == "-m" else {"PYTHONPATH": PYTHON_PATH}
  environment = {**_environment(), **path, **env}
  environment = {k: v for k, v in environment.items() if v is not None}
  if os.path.exists("/proc/self/task") and env.keys() <= _READ_AFTER_IMPORTS:
    return Forked(command, cwd, environment)  # on Linux
  return subprocess.Popen(
    [sys.executable, *command],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    stdin=subprocess.DEVNULL,
    text=True,
  )


@functools.cache
def _server() -> subprocess.Popen:
  """Ends with this process, which holds the other end of its stdin."""
  return subprocess.Popen(
    [sys.executable, pathlib.Path(__file__).with_name("command_server.py")],
    cwd=ROOT,
    # The libraries of linear algebra are to start no threads before the fork.
    env={**_environment(), "OPENBLAS_NUM_THREADS": "1"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _ask_server(**request) -> int:
  print(json.dumps(request), file=_server().stdin, flush=True)
  return int(_server().stdout.readline())


class Forked:
  """What tests use of `subprocess.Popen`, of a fork of the server's process."""

  def __init__(self, command: list[str], cwd, env: dict[str, str]):
    self.returncode = None
    self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
    out, err = (file.name for file in self._files)
    where = {"cwd": os.fspath(cwd), "env": env, "stdout": out, "stderr": err}
    self.pid = _ask_server(run=command, **where)
    self._end = os.pidfd_open(self.pid)  # readable once the process has ended

  def poll(self) -> int | None:
    return self.returncode if self._has_ended(0) else None

  def wait(self, timeout: float = 300) -> int:
    if not self._has_ended(timeout):
      raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
    return self.returncode

  def communicate(self, timeout: float = 300) -> tuple[str, str]:
    self.wait(timeout)
    return self._read(0), self._read(1)

  def errors(self) -> str:
    """What it wrote to stderr so far."""
    return self._read(1)

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)

  def _read(self, which: int) -> str:
    return pathlib.Path(self._files[which].name).read_text()

  def _has_ended(self, timeout: float) -> bool:
    if self.returncode is None:
      if not select.select([self._end], [], [], timeout)[0]:
        return False
      os.close(self._end)
      self.returncode = _ask_server(end_of=self.pid)
    return True


def run(command: str, *, cwd=ROOT, **env) -> subprocess.CompletedProcess:
  """Runs it to its end."""
  process = start(command, cwd, **env)
  out, err = process.communicate(timeout=300)
  return subprocess.CompletedProcess(command, process.returncode, out, err)


def succeed(command: str, **kwargs) -> str:
  """Runs it, expects exit code 0, and returns stdout."""
  done = run(command, **kwargs)
  # A crash ends with a long list of modules.
  said = done.stderr.partition("\nExtension modules: ")[0]
  assert done.returncode == 0, f"exit {done.returncode}: {said[-9000:]}"
  return done.stdout


def last_error(command: str, **kwargs) -> str:
  """Runs it, expects a failure of one clear line, and returns that line."""
  done = run(command, **kwargs)
  assert done.returncode not in (0, 75), done.stdout
  assert "Traceback" not in done.stderr, done.stderr[-3000:]
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("error: "), line
  return line
