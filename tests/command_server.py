"""Forks commands from a process in which what they import is already loaded.

  python command_server.py

Reads one JSON object a line: module, argv, cwd, env, stdout, stderr (files).
Answers with the command's exit code, a line each. Every command is a fork of
its own, made before JAX has a backend: it starts its own, under its own flags,
and ends as the interpreter ends.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

PRELOADED = (
  "clu.metric_writers",
  "diffit_jax.autoencoder.codec",
  "diffit_jax.generation.job",
  "diffit_jax.generation.weights",
  "diffit_jax.training.loop",
  "tensorflow_datasets",
)
TIMEOUT = 300  # seconds, after which SIGALRM ends a command


def next_command() -> dict:
  """Returns once for every line of stdin, each time in a fork."""
  for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
      return json.loads(line)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  os._exit(0)


def main() -> None:
  sys.path[0] = ""  # as `python -m` has it, not the folder of this file
  for name in PRELOADED:
    importlib.import_module(name)
  gc.freeze()  # what is loaded stays in pages that the forks share
  # Another thread could hold a lock that the fork then waits for.
  assert len(os.listdir("/proc/self/task")) == 1
  command = next_command()
  signal.alarm(TIMEOUT)
  for descriptor, name, mode in (
    (0, os.devnull, os.O_RDONLY),
    (1, command["stdout"], os.O_WRONLY),
    (2, command["stderr"], os.O_WRONLY),
  ):
    os.dup2(os.open(name, mode), descriptor)
  os.environ.clear()
  os.environ.update(command["env"])
  os.chdir(command["cwd"])
  sys.argv = [command["module"], *command["argv"]]
  runpy.run_module(command["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
