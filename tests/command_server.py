"""Forks programs from a process in which what they import is already loaded.

  python command_server.py

Reads one JSON object a line and answers with a line. {"run": command line of
Python, cwd, env, stdout, stderr (files)} starts a program and is answered with
its process ID; {"end_of": process ID} waits, and is answered with the exit
code. Every program is a fork of its own, made before JAX has a backend: it
starts its own, under its own flags, and ends as the interpreter ends.
"""

import gc
import importlib
from importlib.util import spec_from_loader
import json
import os
import runpy
import signal
import sys
import traceback

PRELOADED = (
  "diffit_jax.autoencoder.codec",
  "diffit_jax.evaluation.card",
  "diffit_jax.generation.job",
  "diffit_jax.generation.weights",
  "diffit_jax.training.loop",
  "tensorflow_datasets",
)
TIMEOUT = 300  # seconds, after which SIGALRM ends a program
# Run where TensorFlow is installed and where it is not: no import is tried.
WITHOUT_TENSORFLOW = [
  f"diffit_jax.{name}"
  for name in ("main", "sample", "evaluate", "export", "plan")
]


class NoTensorFlow:
  """Ends a program that imports it, whatever catches errors there."""

  @staticmethod
  def find_spec(name, *_):  # asking whether it is installed is no import
    if name == "tensorflow":
      return spec_from_loader(name, NoTensorFlow)

  @staticmethod
  def create_module(_):
    return None  # an ordinary one

  @staticmethod
  def exec_module(_):
    traceback.print_stack()
    print("error: it imports TensorFlow", file=sys.stderr, flush=True)
    os._exit(99)


def next_program() -> dict:
  """Returns once for every program to run, each time in a fork."""
  for line in sys.stdin:
    request = json.loads(line)
    if "end_of" in request:
      _, status = os.waitpid(request["end_of"], 0)
      print(os.waitstatus_to_exitcode(status), flush=True)
      continue
    pid = os.fork()
    if pid == 0:
      return request
    print(pid, flush=True)
  os._exit(0)


def run(first: str, *rest: str) -> None:
  """As `python -m MODULE ...`, `python -c CODE ...` or `python FILE ...`."""
  if first == "-m":
    sys.argv = list(rest)
    if rest[0] in WITHOUT_TENSORFLOW:
      sys.meta_path.insert(0, NoTensorFlow)
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
  elif first == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(rest[0], {"__name__": "__main__"})
  else:
    sys.argv = [first, *rest]
    sys.path[0] = os.path.dirname(first)
    runpy.run_path(first, run_name="__main__")


def main() -> None:
  sys.path[0] = ""  # the project's folder, not that of this file
  for name in PRELOADED:
    importlib.import_module(name)
  gc.freeze()  # what is loaded stays in pages that the forks share
  # Another thread could hold a lock that the fork then waits for.
  assert len(os.listdir("/proc/self/task")) == 1
  program = next_program()
  signal.alarm(TIMEOUT)
  for descriptor, name, mode in (
    (0, os.devnull, os.O_RDONLY),
    (1, program["stdout"], os.O_WRONLY | os.O_APPEND),
    (2, program["stderr"], os.O_WRONLY | os.O_APPEND),
  ):
    os.dup2(os.open(name, mode), descriptor)
  os.environ.clear()
  os.environ.update(program["env"])
  sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
  os.chdir(program["cwd"])
  run(*program["run"])


if __name__ == "__main__":
  main()
