"""`diffit_jax.main` up to its first step, with the time that each part took.

`python -m benchmarks.first_step FLAGS`, with main's flags, is what
benchmarks/compile_time.py starts; START in the environment is when it did, in
seconds since 1970. The last line on standard output is {part: seconds}. The
process ends before anything is saved.
"""

import dataclasses
import functools
import json
import os
import time

import jax

from diffit_jax import cli, main
from diffit_jax.training import loop

START = "FIRST_STEP_START"


class Clock:
  """Seconds of named parts; what no part claims is "other"."""

  def __init__(self):
    self.parts: dict[str, float] = {}

  def timed(self, name: str, call):
    """`call`, until its results are there, noted under `name`."""

    @functools.wraps(call)
    def wrapped(*args, **kwargs):
      start = time.monotonic()
      result = jax.block_until_ready(call(*args, **kwargs))
      self.parts[name] = time.monotonic() - start
      return result

    return wrapped

  def finish(self) -> None:
    total = time.time() - float(os.environ[START])
    self.parts["other"] = total - sum(self.parts.values())
    print(json.dumps(self.parts | {"total": total}), flush=True)
    os._exit(0)


def install(clock: Clock) -> None:
  """Puts the clock into the loop; the work done is the same."""
  clock.parts["imports"] = time.time() - float(os.environ[START])
  build = loop.program.build

  def timed_build(*args):
    program = clock.timed("build", build)(*args)

    def step(*inputs):
      lower = lambda: program.train_step.lower(*inputs)
      lowered = clock.timed("trace step", lower)()
      compiled = clock.timed("compile step", lowered.compile)()
      out = clock.timed("run step", compiled)(*inputs)
      clock.finish()
      return out

    return dataclasses.replace(program, train_step=step)

  loop.program.build = timed_build
  loop.open_data = clock.timed("data", loop.open_data)
  loop.state.create = clock.timed("initial state", loop.state.create)


if __name__ == "__main__":
  install(Clock())
  cli.run(main.main)
