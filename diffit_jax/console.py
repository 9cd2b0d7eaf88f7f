"""The console command: `diffit NAME ...` is `python -m diffit_jax.NAME ...`."""

import ast
import importlib.util
import os
import pathlib
import runpy
import sys

from diffit_jax import __version__, interrupt

# What is typed -> the module that it runs.
COMMANDS = {"train": "main"} | {
  name: name
  for name in "sample evaluate export prepare plan demo explore".split()
}


def main() -> None:
  """Runs the command that the first argument names, with the others."""
  interrupt.handle()
  name, *rest = sys.argv[1:] or ["--help"]
  if name in ("--help", "-h", "help"):
    print(usage())
  elif name == "--version":
    print(f"diffit_jax {__version__}")
  elif name not in COMMANDS:
    sys.exit(
      f"error: there is no command {name!r}: use one of {', '.join(COMMANDS)}"
    )
  else:
    if not sys.flags.safe_path:  # as `python -m` has it, for config files
      sys.path.insert(0, os.getcwd())
    sys.argv = [f"diffit {name}", *rest]
    module = f"diffit_jax.{COMMANDS[name]}"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def usage() -> str:
  """Every command with the first line of its module's docstring."""
  lines = [f"  {name:9}{_first_line(name)}" for name in COMMANDS]
  return "\n".join(
    ["diffit COMMAND --help lists the flags of a command:", "", *lines]
  )


def _first_line(name: str) -> str:
  """Read from the file, as importing all of them would take its time."""
  spec = importlib.util.find_spec(f"diffit_jax.{COMMANDS[name]}")
  tree = ast.parse(pathlib.Path(spec.origin).read_text())
  return ast.get_docstring(tree).splitlines()[0].rstrip(".")


if __name__ == "__main__":
  main()
