"""What one accelerator says about the project: docs/gpu.md.

  python -m benchmarks.on_device [--seconds=330] [--stages=machine,...]
      [--torch_python=PATH] [--tiny] [--out=DIR]
  python -m benchmarks.on_device --stages= --merge=DIR/rows.jsonl

Runs the stages of stages.py one after the other, each in a process of its own
that has the device to itself, may crash, and is ended when its share of the
time is over. Rows go, as they are made, to OUT/rows.jsonl, what the processes
print to OUT/log.txt; then into the JSON, where they replace those of the same
stage, card, commit and date; and the page is written anew. --tiny runs the same
programs at sizes for a CPU, and leaves docs/ as it is.
"""

import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import report, yardstick
from benchmarks.on_device import child, page, rows
from benchmarks.on_device.stages import STAGES, Stage
from diffit_jax import cli

_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU, no caps on time.")
_SECONDS = flags.DEFINE_float("seconds", 1e4, "Of all stages together.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), "In this order.")
_OUT = cli.define_path("out", "Folder of rows and log.", "runs/on_device")
_PAGE = cli.define_path("page", "To write; docs/gpu.md if not --tiny.")
_MERGE = cli.define_path("merge", "Rows of another machine to add first.")
_COMMIT = flags.DEFINE_string("commit", None, "For a copy that has no git.")

LEAST = 15  # seconds in which a stage can do something
TINY_CAP = 900


def environment() -> dict[str, str]:
  """Variables of a stage's process."""
  env = dict(os.environ)
  path = [str(report.ROOT), env.get("PYTHONPATH")]
  env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
  # One process has the device; CUDA's own libraries need some of it.
  env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
  env.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
  platforms = [x for x in env.get("JAX_PLATFORMS", "").split(",") if x]
  if platforms and "cpu" not in platforms:  # the goldens' float64
    env["JAX_PLATFORMS"] = ",".join([*platforms, "cpu"])
  return env


def interpreter(stage: Stage) -> str:
  return (yardstick.python() if stage.needs_torch else None) or sys.executable


def run(
  stage: Stage, seconds: float, about: dict, out: pathlib.Path
) -> list[dict]:
  """One stage's rows, the last of which says how its process ended.

  Args:
    stage: to run.
    seconds: after which it is ended.
    about: commit, date, tiny, and the card where no row tells it.
    out: folder of rows and log.
  """
  path, start = out / "rows.jsonl", time.time()
  num_before = len(rows.read(path))
  about = {"stage": stage.name, **about}
  end = start + seconds - 2  # a stage stops by itself if it can
  task = dict(entry=stage.entry, path=str(path), end=end, about=about)
  command = [interpreter(stage), "-m", "benchmarks.on_device.child"]
  with tempfile.TemporaryFile() as log:
    code = wait(
      subprocess.Popen(
        [*command, json.dumps(task)],
        cwd=report.ROOT,
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      ),
      seconds,
    )
    log.seek(0)
    text = log.read().decode(errors="replace")
  with open(out / "log.txt", "a") as whole:
    whole.write(f"==== {stage.name}\n{text}\n")
  if code == child.NO_ACCELERATOR:
    raise SystemExit(f"{text.strip().splitlines()[-1]}: try --tiny")
  made = rows.read(path)[num_before:]
  if made:
    about["card"] = made[-1]["card"]
  ended = {**about, "case": rows.PROCESS, "s": round(time.time() - start, 1)}
  if code is None:
    ended["error"] = f"ended after {seconds:.0f} s, all that it was given"
  elif code:
    tail = " ".join(text.split())[-300:]
    ended["error"] = f"exit code {code}: {tail}"
  rows.append(path, ended)
  return [*made, ended]


def wait(process: subprocess.Popen, seconds: float) -> int | None:
  """The exit code, None if it came too late; nothing it started is left."""
  try:
    return process.wait(seconds)
  except subprocess.TimeoutExpired:
    return None
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # its session is its own
    process.wait()


def show(made: list[dict]) -> None:
  """Prints rows as they are, without what all of them share."""
  for row in made:
    own = {k: v for k, v in row.items() if k not in rows.GROUP}
    print(json.dumps(own), flush=True)


def keep(new: list[dict]) -> None:
  """Merges rows into the JSON, and writes the page of all of them."""
  default = pathlib.Path(report.ROOT, "docs")
  if _TINY.value:
    default = pathlib.Path(_OUT.value)
  path = pathlib.Path(report.JSON.value or default / "gpu.json")
  found = rows.merge(rows.load(path), new)
  if found:
    rows.save(path, found)
  target = _PAGE.value or (None if _TINY.value else default / "gpu.md")
  if target:
    pathlib.Path(target).write_text(page.write(found))


def main(_) -> None:
  names = [name for name in _STAGES.value if name]
  if unknown := set(names) - set(STAGES):
    raise SystemExit(f"--stages={unknown.pop()}: use {', '.join(STAGES)}")
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  found = rows.read(_MERGE.value) if _MERGE.value else []
  keep(found)
  if not names:
    return
  for name in ("rows.jsonl", "log.txt"):
    (out / name).unlink(missing_ok=True)
  about = {
    "commit": _COMMIT.value or report.commit(),
    "date": datetime.date.today().isoformat(),
    "card": child.UNKNOWN,
    "tiny": _TINY.value,
  }
  end = time.time() + _SECONDS.value
  for name in names:
    cap = TINY_CAP if _TINY.value else STAGES[name].cap
    left = end - time.time()
    if left < min(LEAST, cap):
      print(f"{name}: not begun, {max(left, 0):.0f} s are left", flush=True)
      continue
    made = run(STAGES[name], min(cap, left), about, out)
    about["card"] = made[-1]["card"]
    show(made)
    found = rows.merge(found, made)
    keep(found)


if __name__ == "__main__":
  app.run(main)
