"""Stage `digits`: training from data to score, as a user runs it.

`python -m diffit_jax.main --config=configs/digits.py`, killed (SIGKILL) once it
has saved, started again, sampled and scored; and a short run whose checkpoint
of this device goes on on the CPU, and the other way round. Every program has
the device to itself, so this process starts no backend.
"""

import functools
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks.on_device import rows

DATA_PACKAGES = ("grain", "tensorflow_datasets", "array_record")
CROSS_STEPS = 6  # saved every 2


def card() -> str:
  code = "from benchmarks.on_device import device; print(device.card())"
  return run("-c", code).splitlines()[-1]


def missing() -> str | None:
  """Why the data cannot be read here, or None."""
  for name in DATA_PACKAGES:
    try:
      importlib.import_module(name)
    except Exception as error:  # noqa: BLE001  or one that it imports
      return f"cannot import {name}: {rows.first_lines(error)}"
  return None


def measure(record: rows.Record) -> None:
  if reason := missing():
    record.add("digits", skipped=reason)
    return
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    data = str(folder / "data")
    run("-m", "diffit_jax.prepare", "digits", f"--data_dir={data}")
    shared = folder, data
    whole = functools.partial(train_killed, *shared, record.is_tiny)
    record.attempt("killed once, resumed", whole, table="run")
    here, cpu = os.environ.get("JAX_PLATFORMS"), "cpu"
    for case, name, first, then in (
      ("saved here, goes on on the CPU", "here", here, cpu),
      ("saved on the CPU, goes on here", "cpu", cpu, here),
    ):
      check = functools.partial(cross, *shared, name, first, then)
      record.attempt(case, check, table="checkpoints")


def run(*command: str, platforms: str | None = None, **env) -> str:
  """A Python program's stdout; a failure raises with stderr's last line."""
  env = {**os.environ, **env}
  if platforms:
    env["JAX_PLATFORMS"] = platforms
  done = subprocess.run(
    [sys.executable, *command], env=env, capture_output=True, text=True
  )
  if done.returncode:
    said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    raise RuntimeError(f"exit code {done.returncode}: {said[0]}")
  return done.stdout


def main_command(workdir: pathlib.Path, data: str, variant: str) -> list[str]:
  config = f"--config=configs/digits.py{variant}"
  dirs = [f"--workdir={workdir}", f"--data_dir={data}"]
  return ["-m", "diffit_jax.main", config, *dirs]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Complete checkpoints."""
  found = (workdir / "checkpoints").glob("[0-9]*")
  return sorted(int(p.name) for p in found if p.name.isdigit())


def train_killed(folder: pathlib.Path, data: str, is_tiny: bool) -> dict:
  """Trains, is killed after the first checkpoint, goes on, samples, scores."""
  workdir, variant = folder / "digits", ":debug" if is_tiny else ""
  command = main_command(workdir, data, variant)
  start = time.monotonic()
  killed_at = kill_once_saved([sys.executable, *command], workdir)
  killed_s = time.monotonic() - start
  start = time.monotonic()
  run(*command)
  resumed_s = time.monotonic() - start
  steps = saved_steps(workdir)[-1]
  start = time.monotonic()
  demo = ["-m", "diffit_jax.demo", f"--workdir={workdir}"]
  demo += ["--variant=debug"] if is_tiny else []
  run(*demo, TFDS_DATA_DIR=data)
  report = json.loads((workdir / "demo.json").read_text())
  return {
    "killed after step": killed_at,
    "s until killed": killed_s,
    "s from there": resumed_s,
    "steps": steps,
    "s of 500 samples and scores": time.monotonic() - start,
    "recognised": report["recognised"],
    "recognised, real digits": report["recognised_real"],
    "Fréchet distance, digits' features": report["frechet_digits"],
  }


def kill_once_saved(command: list[str], workdir: pathlib.Path) -> int | None:
  """The newest step saved at the kill; None where the run ended before it."""
  process = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while process.poll() is None:
    if steps := saved_steps(workdir):
      process.send_signal(signal.SIGKILL)
      process.wait()
      return steps[-1]
    time.sleep(0.02)
  if process.returncode:
    raise RuntimeError(f"the first run: exit code {process.returncode}")
  return None


def cross(
  folder: pathlib.Path, data: str, name: str, first: str | None, then: str
) -> dict:
  """A short run on one platform goes on on another from a checkpoint before.

  The distance is that of the averaged weights at the end from those of the run
  that stayed; steps on different hardware round differently.

  Args:
    folder: to work in.
    data: the prepared digits.
    name: of the runs' folders.
    first, then: JAX_PLATFORMS; None for what JAX takes by itself.
  """
  stayed, moved = folder / f"{name}_stayed", folder / f"{name}_moved"
  command = functools.partial(main_command, data=data, variant=":debug")
  steps = f"--config.total_steps={CROSS_STEPS}"
  run(*command(stayed), steps, platforms=first)
  shutil.copytree(stayed, moved)
  for step in saved_steps(moved)[1:]:
    shutil.rmtree(moved / "checkpoints" / str(step))
  begins = saved_steps(moved)[-1]
  run(*command(moved), steps, platforms=then)
  ends = saved_steps(moved)[-1]
  if ends != CROSS_STEPS:
    raise RuntimeError(f"it ended at step {ends} of {CROSS_STEPS}")
  return {
    "goes on from step": begins,
    "ends at step": ends,
    "distance of the weights": weights_distance(stayed, moved),
  }


def weights_distance(a: pathlib.Path, b: pathlib.Path) -> float:
  """Relative distance of two runs' averages."""
  from safetensors.numpy import load_file

  def load(workdir: pathlib.Path) -> dict:
    out = workdir.with_suffix(".safetensors")
    arguments = f"--workdir={workdir}", f"--out={out}"
    run("-m", "diffit_jax.export", *arguments, platforms="cpu")
    return load_file(out)

  a, b = load(a), load(b)
  squares = lambda x: sum(float((x[k] ** 2).sum()) for k in x)
  return (squares({k: a[k] - b[k] for k in a}) / squares(a)) ** 0.5
