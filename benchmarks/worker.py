"""A program beside the benchmark that answers calls, one at a time.

Both ends of the talk; only the standard library, since the other end may be a
Python that has PyTorch and nothing of this project. A call is one line of JSON
{"call": name, argument: value, ...}, an answer one line of JSON. The worker
first answers once by itself: with its versions.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def serve(hello: dict, commands: dict[str, Callable[..., object]]) -> None:
  """The worker's end: answers until its input ends.

  Args:
    hello: the first answer.
    commands: name -> function of a call's arguments that returns the answer.
  """
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # whatever a library prints is no answer
  say = lambda value: print(json.dumps(value), file=answers, flush=True)
  say(hello)
  for line in sys.stdin:
    call = json.loads(line)
    say(commands[call.pop("call")](**call))


def give_memory_back() -> None:
  """Returns what was freed to the system: the other program needs it."""
  gc.collect()
  trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's
  trim(0)


@contextlib.contextmanager
def start(
  python: str, module: str, *args: str
) -> Iterator[tuple[dict, Callable]]:
  """The benchmark's end: runs a worker and gives (its hello, the call).

  Args:
    python: interpreter.
    module: of this repository, to be run as a program.
    *args: of its command line.
  """
  with subprocess.Popen(
    [python, "-m", module, *args],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:

    def read():
      line = process.stdout.readline()
      if not line:
        raise SystemExit(f"{python} -m {module} ended without an answer")
      return json.loads(line)

    def call(name: str, **arguments):
      process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
      process.stdin.flush()
      return read()

    yield read(), call
    process.stdin.close()
