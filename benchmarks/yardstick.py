"""The PyTorch of `torch_reference/`, beside ours where its Python is there."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import shutil

import numpy as np

from benchmarks import worker
from benchmarks.report import ROOT
from diffit_jax import cli

PLACE = ".venv-torch/bin/python"
ATTENTIONS = ("eager", "sdpa")

_PYTHON = cli.define_path(
  "torch_python", f"Python that has torch; {PLACE} where it exists."
)


def python() -> str | None:
  """The interpreter to use, or None where there is none to be found."""
  if _PYTHON.value:
    found = shutil.which(_PYTHON.value)
    if not found:
      raise SystemExit(f"--torch_python={_PYTHON.value} cannot be run")
    return found
  own = pathlib.Path(ROOT, PLACE)
  return str(own) if own.exists() else None


@contextlib.contextmanager
def start(
  module: str = "networks", *args: str
) -> Iterator[tuple[str, Callable | None]]:
  """Gives (a sentence for the report, the worker's call or None)."""
  found = python()
  if found is None:
    yield (
      f"PyTorch's rows are left out: {PLACE} is missing (see"
      " benchmarks/torch_reference/) and --torch_python is not given.",
      None,
    )
    return
  name = f"benchmarks.torch_reference.{module}"
  with worker.start(found, name, *args) as (hello, call):
    yield f"Beside {hello['version']}.", call


def check_equal(ours, its, what: str, tolerance: float = 1e-4) -> float:
  """The largest difference over the largest value; ends the program if large.

  Args:
    ours: array.
    its: PyTorch's, of the same shape.
    what: is compared, for the message.
    tolerance: that the difference must stay below.
  """
  ours, its = np.asarray(ours), np.asarray(its)
  if ours.shape != its.shape:
    raise SystemExit(f"{what}: {ours.shape} here, {its.shape} in PyTorch")
  off = float(np.abs(ours - its).max() / np.abs(its).max())
  if not off < tolerance:
    raise SystemExit(f"{what} differs from PyTorch's by {off:.1e}")
  return off
