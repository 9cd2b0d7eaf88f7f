"""Safetensors files of whatever layout: opened, or refused in one sentence.

Weights are float32 from here on: a file in half or in double precision is read
as the float32 values that it stands for, so that training and sampling never
see another type. Tensors of other kinds are refused where weights are wanted.
"""

from collections.abc import Collection, Iterator
import contextlib
import os
import pathlib
import shlex

import numpy as np
import safetensors

from diffit_jax.errors import UserError

# CHOICE: 8-bit floats are refused: they come with scales of somebody's own.
FLOATS = ("F32", "F16", "BF16", "F64")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@contextlib.contextmanager
def open_file(path: str | os.PathLike) -> Iterator[safetensors.safe_open]:
  """The mapped file, whose tensors are numpy arrays.

  Raises:
    UserError: a pickle, or not a whole safetensors file; also where that comes
      to light in the body.
  """
  path = pathlib.Path(path)
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      yield file
  except (OSError, safetensors.SafetensorError) as error:
    if path.suffix in PICKLE_SUFFIXES or _starts_as_pickle(path):
      target = path.with_suffix(".safetensors")
      raise UserError(refuse_pickle(path, target)) from error
    raise UserError(
      f"{path} is not a whole safetensors file ({error}): a partial download"
      " or a damaged copy, get it again"
    ) from error


def read_float32(file: safetensors.safe_open, name: str) -> np.ndarray:
  """A tensor, of a type without `wrong_type`, in float32."""
  return file.get_tensor(name).astype(np.float32, copy=False)


def wrong_type(
  name: str, dtype: str, allowed: Collection[str] = FLOATS
) -> str | None:
  """Says that a tensor is not of an allowed type; None where it is.

  Args:
    name: name of the tensor.
    dtype: as the file names it, for example "BF16".
    allowed: types of that kind.
  """
  if dtype in allowed:
    return None
  return f"{name} is of type {dtype} instead of {' or '.join(allowed)}"


def refuse_pickle(path: str | os.PathLike, target: str | os.PathLike) -> str:
  """Why a pickle is not read, and the command that converts it."""
  return (
    f"{path} is a pickle and is never loaded; convert it where PyTorch is"
    f" installed: {conversion(path, target)}"
  )


def conversion(source: str | os.PathLike, target: str | os.PathLike) -> str:
  """The command that turns a PyTorch state dict into safetensors."""
  return (
    'python -c "import sys, torch, safetensors.torch as s;'
    " w = torch.load(sys.argv[1], map_location='cpu', weights_only=True);"
    ' s.save_file({k: v.contiguous() for k, v in w.items()}, sys.argv[2])"'
    f" {shlex.quote(str(source))} {shlex.quote(str(target))}"
  )


def _starts_as_pickle(path: pathlib.Path) -> bool:
  """Whether a file begins as torch.save's do: a zip, or a bare pickle.

  A header's length may have the bytes of a pickle; then "{" follows it.
  """
  try:
    with path.open("rb") as file:
      start = file.read(9)
  except OSError:
    return False
  is_bare = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
  return start.startswith(b"PK\3\4") or (is_bare and start[8:] != b"{")
