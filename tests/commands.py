"""Runs the project's commands as a user would: in a process of their own."""

import os
import pathlib
import subprocess
import sys

# These programs are compiled to run a few tiny steps: do not optimise them.
FAST_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
ROOT = pathlib.Path(__file__).parent.parent


def start(command: str, cwd=ROOT, **env) -> subprocess.Popen:
  """Starts `python -m diffit_jax.<command>` on one CPU device."""
  environment = {
    **os.environ,
    "XLA_FLAGS": FAST_COMPILE,
    "JAX_PLATFORMS": "cpu",
    **env,
  }
  return subprocess.Popen(
    [sys.executable, "-m", *f"diffit_jax.{command}".split()],
    cwd=cwd,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    stdin=subprocess.DEVNULL,
    text=True,
  )


def run(command: str, **kwargs) -> subprocess.CompletedProcess:
  """Runs it to its end."""
  process = start(command, **kwargs)
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
