"""Runs the project's commands as a user would: in a process of their own.

Most of a small command's time goes into imports. `run` therefore forks what it
can from a process that has them behind it (`command_server.py`); `start`, and
`run` wherever PYTHONPATH or anything else that imports may depend on is set,
start an interpreter anew.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Without its MLIR emitters, XLA for CPU compiles the same program in a sixth to
# six tenths of the time.
FEWER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
# For jax.jit, where rounding is compared to the last bits.
AS_USERS = {"xla_cpu_use_fusion_emitters": True}
# Tests compile much and compute little: do not optimise.
FAST_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  f" {FEWER_EMITTERS}"
)
ROOT = pathlib.Path(__file__).parent.parent
PYTHON_PATH = f"{ROOT}:{ROOT / 'tests'}"  # of programs that import from tests/
_READ_AFTER_IMPORTS = {"XLA_FLAGS", "TFDS_DATA_DIR"}


def _environment(env: dict[str, str]) -> dict[str, str]:
  return {
    **os.environ,
    "XLA_FLAGS": FAST_COMPILE,
    "JAX_PLATFORMS": "cpu",
    **env,
  }


def _module_and_arguments(command: str) -> list[str]:
  return f"diffit_jax.{command}".split()


def start(command: str, cwd=ROOT, **env) -> subprocess.Popen:
  """Starts `python -m diffit_jax.<command>` on one CPU device."""
  return subprocess.Popen(
    [sys.executable, "-m", *_module_and_arguments(command)],
    cwd=cwd,
    env=_environment(env),
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
    env={**_environment({}), "OPENBLAS_NUM_THREADS": "1"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _fork(
  command: str, cwd, env: dict[str, str]
) -> subprocess.CompletedProcess:
  """Runs it in a fork of the server's process."""
  module, *argv = _module_and_arguments(command)
  with (
    tempfile.NamedTemporaryFile("r") as out,
    tempfile.NamedTemporaryFile("r") as err,
  ):
    request = {
      "module": module,
      "argv": argv,
      "cwd": os.fspath(cwd),
      "env": _environment(env),
      "stdout": out.name,
      "stderr": err.name,
    }
    print(json.dumps(request), file=_server().stdin, flush=True)
    code = int(_server().stdout.readline())
    return subprocess.CompletedProcess(command, code, out.read(), err.read())


def run(command: str, *, cwd=ROOT, **env) -> subprocess.CompletedProcess:
  """Runs it to its end."""
  can_fork = os.path.exists("/proc/self/task")  # Linux
  if can_fork and env.keys() <= _READ_AFTER_IMPORTS:
    return _fork(command, cwd, env)
  process = start(command, cwd, **env)
  out, err = process.communicate(timeout=300)
  return subprocess.CompletedProcess(command, process.returncode, out, err)


def succeed(command: str, **kwargs) -> str:
  """Runs it, expects exit code 0, and returns stdout."""
  done = run(command, **kwargs)
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def last_error(command: str, **kwargs) -> str:
  """Runs it, expects a failure of one clear line, and returns that line."""
  done = run(command, **kwargs)
  assert done.returncode not in (0, 75), done.stdout
  assert "Traceback" not in done.stderr, done.stderr[-3000:]
  line = done.stderr.strip().splitlines()[-1]
  assert line.startswith("error: "), line
  return line
