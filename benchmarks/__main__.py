"""`make bench`: the short form of every program, written to docs/benchmarks.md.

  python -m benchmarks [--only=train_step,attention] [--out=docs/benchmarks.md]

The page is what the programs print; nothing in it is typed by hand. With --only
it keeps the other sections, each of which says what commit it is of. The file
is replaced once every program has succeeded.
"""

import ast
import pathlib
import subprocess
import sys
import time

from absl import app, flags

from benchmarks.report import ROOT
from diffit_jax import cli, whole

PROGRAMS = (
  "train_step",
  "products",
  "attention",
  "sampling",
  "input_pipeline",
  "compile_time",
  "checkpoint",
  "metrics",
  "inception",
  "plan_table",
  "knobs",
)

_ONLY = flags.DEFINE_list("only", [], "Programs; all of them if empty.")
_OUT = cli.define_path("out", "The page.", "docs/benchmarks.md")

MARK = "## "  # before a section
HEAD = """# Benchmarks

Written by `make bench`; do not edit. Figures are medians of turns in which the
alternatives alternate, so that a busy machine slows all of them. Each program
has a longer form: `python -m benchmarks.NAME --help`.
"""


def run(name: str) -> str:
  """One program's section of the page, from its name on."""
  command = [sys.executable, "-m", f"benchmarks.{name}", "--short"]
  start = time.monotonic()
  print(f"{name} ...", file=sys.stderr, flush=True)
  done = subprocess.run(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
  )
  took = time.monotonic() - start
  print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
  if done.returncode:
    raise SystemExit(f"{name} failed with exit code {done.returncode}")
  source = (ROOT / "benchmarks" / f"{name}.py").read_text()
  question = ast.get_docstring(ast.parse(source)).partition("\n")[0]
  return (
    f"{name}: {question}\n\n`python -m benchmarks.{name} --short`, took"
    f" {took:.0f} s\n\n{done.stdout.strip()}\n"
  )


def sections(page: str) -> dict[str, str]:
  """{program: its section} of a page."""
  return {
    text.partition(":")[0]: text for text in page.split(f"\n{MARK}")[1:]
  }


def main(_) -> None:
  if unknown := set(_ONLY.value) - set(PROGRAMS):
    raise SystemExit(f"--only={unknown.pop()}: one of {', '.join(PROGRAMS)}")
  out = pathlib.Path(ROOT, _OUT.value)
  old = sections(out.read_text()) if _ONLY.value and out.exists() else {}
  new = {name: run(name) for name in _ONLY.value or PROGRAMS}
  texts = {**old, **new}
  page = f"\n{MARK}".join([HEAD, *(texts[n] for n in PROGRAMS if n in texts)])
  with whole.writing(out) as partial:
    partial.write_text(page)


if __name__ == "__main__":
  app.run(main)
