"""What every benchmark shares: flags, turns, and one way to print a report.

A program is a module `benchmarks/NAME.py`, run as `python -m benchmarks.NAME`,
whose docstring says what it answers and whose `main` ends in `emit`. With
--short it takes its share of `make bench`, a minute or two on 2 cores; with
--json it also writes what it printed. To join `make bench`, a program is named
in `__main__.py`, and nothing else.
"""

from collections.abc import Callable
import dataclasses
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

from absl import flags

from diffit_jax import cli

SHORT = flags.DEFINE_bool("short", False, "The share of `make bench`.")
JSON = cli.define_path("json", "Also write the report to this file.")

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass
class Table:
  """One question's answer.

  Attributes:
    title: what is measured, with its sizes.
    rows: {column: value}, all with the same columns; floats are printed with
      four digits, None as "-".
    notes: sentences below it, such as ratios.
  """

  title: str
  rows: list[dict]
  notes: list[str] = dataclasses.field(default_factory=list)

  def markdown(self) -> str:
    columns = list(self.rows[0])
    lines = [
      f"{self.title}\n",
      f"| {' | '.join(columns)} |",
      "|---" * len(columns) + "|",
    ]
    lines += [
      f"| {' | '.join(_cell(row[column]) for column in columns)} |"
      for row in self.rows
    ]
    return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def _cell(value) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    digits = f"{value:.4g}"
    return f"{value:,.0f}" if "e+" in digits else digits
  return f"{value:,}" if type(value) is int else str(value)


def installed(packages: tuple[str, ...]) -> tuple[str, ...]:
  """Those of the packages that are there."""

  def is_there(name):
    try:
      return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
      return False

  return tuple(filter(is_there, packages))


def machine(packages: tuple[str, ...] = PACKAGES, device=None) -> dict:
  """What the figures were made on; starts no backend.

  Args:
    packages: whose versions matter.
    device: jax.Device that was measured, if it is another than the CPU.
  """
  about = {}
  if device is not None:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    about = {"card": device.device_kind, "platform": device.platform}
    about["memory for JAX, GiB"] = limit and round(limit / 2**30, 1)
  return {
    **about,
    "cpu": _cpu_model(),
    "cores": os.cpu_count(),
    "load": round(os.getloadavg()[0], 1),
    "jax_platforms": os.environ.get("JAX_PLATFORMS", ""),
    "python": platform.python_version(),
    **{name: metadata.version(name) for name in packages},
    "commit": commit(),
    "date": datetime.date.today().isoformat(),
  }


def _cpu_model() -> str:
  try:
    with open("/proc/cpuinfo") as file:
      names = [x.partition(":")[2] for x in file if x.startswith("model name")]
  except OSError:
    names = []
  return f"{platform.machine()} {''.join(names[:1]).strip()}".strip()


def commit() -> str:
  """Short name of the project's commit, "unknown" outside of git."""
  git = lambda *args: subprocess.run(
    ["git", *args], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()
  try:
    changed = " with changes" if git("status", "--porcelain", "-uno") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed
  except OSError:
    return "unknown"


def emit(
  tables: list[Table],
  notes: list[str] = (),
  packages: tuple[str, ...] = PACKAGES,
) -> None:
  """Prints machine, notes and tables as Markdown, and writes --json.

  Args:
    tables: at least one.
    notes: sentences about the whole run, such as what was left out and why.
    packages: whose versions matter.
  """
  about = machine(packages)
  print(", ".join(f"{k} {v}" for k, v in about.items() if v != ""))
  for text in [*notes, *(table.markdown() for table in tables)]:
    print(f"\n{text}")
  sys.stdout.flush()
  if JSON.value:
    report = {
      "command": shlex.join(sys.argv),
      "machine": about,
      "notes": list(notes),
      "tables": [dataclasses.asdict(table) for table in tables],
    }
    pathlib.Path(JSON.value).write_text(json.dumps(report, indent=2) + "\n")


def seconds(function: Callable, *args) -> float:
  """One call of a jax function, until its results are there."""
  import jax

  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def in_turns(
  alternatives: dict[str, Callable[[], float]], num_turns: int
) -> dict[str, list[float]]:
  """Seconds of each alternative, taken one after the other, turn by turn.

  A turn before the first is not counted: it compiles and fills caches. In a
  turn of calls under a second, the first only wakes the threads; the turn is
  the median of those after it, five or what half a second holds.

  Args:
    alternatives: name -> a call that runs once and returns its seconds.
    num_turns: how often each is measured.
  """

  def settled(call):
    first, rest = call(), []
    if first > 1:
      return first
    while not rest or (len(rest) < 5 and sum(rest) < 0.5):
      rest.append(call())
    return statistics.median(rest)

  times = {name: [] for name in alternatives}
  for turn in range(num_turns + 1):
    for name, call in alternatives.items():
      took = settled(call)
      if turn:
        times[name].append(took)
  return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
  return {name: statistics.median(values) for name, values in times.items()}


def spread(values: list[float]) -> str:
  """Fastest and slowest, beside a median."""
  return f"{min(values):.4g} to {max(values):.4g}"


def matmul_rate(n: int = 2048, num_turns: int = 5) -> float:
  """float32 products of square matrices by jax, in 10^9 operations a second."""
  import jax
  import jax.numpy as jnp

  a = jnp.ones((n, n))
  product = jax.jit(
    lambda a: jnp.dot(a, a, precision=jax.lax.Precision.HIGHEST)
  )
  times = in_turns({"product": lambda: seconds(product, a)}, num_turns)
  return 2 * n**3 / medians(times)["product"] / 1e9
