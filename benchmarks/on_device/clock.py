"""Seconds of a call on a device that works behind the program's back."""

from collections.abc import Callable
import statistics
import time

brief = False  # in a tiny run: rounds of one call


def seconds_per_call(
  call: Callable,
  wait: Callable,
  rounds: int = 3,
  at_least: float = 0.3,
) -> float:
  """Median over rounds of the mean over a round's calls.

  The calls of a round are not waited for one by one, as in training. A call
  before all others is not counted.

  Args:
    call: () -> result, which may not be there yet.
    wait: (result) returns once it is there.
    rounds: that are measured.
    at_least: seconds of a round, which has 1 to 50 calls.
  """
  wait(call())
  start = time.perf_counter()
  wait(call())
  once = time.perf_counter() - start
  num = max(1, min(50, round(at_least / max(once, 1e-5)))) if not brief else 1
  found = []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(num):
      result = call()
    wait(result)
    found.append((time.perf_counter() - start) / num)
  return statistics.median(found)
