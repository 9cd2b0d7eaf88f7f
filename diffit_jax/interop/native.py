"""Our own layout: a safetensors file that says what it is.

Tensor names are the parameter tree's paths joined by "/", values float32 as
trained. The header holds the run's config as JSON, the training step and the
name of the average, so that sampling needs nothing beside the file.
"""

from collections.abc import Mapping
import os
import pathlib

from flax import traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from diffit_jax.errors import UserError

FORMAT = "diffit_jax"
_KEYS = ("format", "config", "step", "ema")


def save(
  path: str | os.PathLike, params: Mapping, header: Mapping[str, str]
) -> None:
  """Writes `params` atomically.

  Args:
    path: ends in .safetensors.
    params: nested dict of arrays.
    header: config (JSON), step and ema, all text.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise UserError(f"{path}: the file's name must end in .safetensors")
  flat = traverse_util.flatten_dict(dict(params), sep="/")
  tensors = {n: np.ascontiguousarray(array) for n, array in flat.items()}
  partial = path.with_name(path.name + ".partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, partial, {"format": FORMAT, **header})
    os.replace(partial, path)
  except (OSError, safetensors.SafetensorError) as error:
    if path.parent.is_dir():
      partial.unlink(missing_ok=True)
    raise UserError(f"writing {path} failed: {error}") from error


def is_native(path: str | os.PathLike) -> bool:
  """Whether a file says in its header that `save` wrote it."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return (file.metadata() or {}).get("format") == FORMAT
  except (OSError, safetensors.SafetensorError):
    return False  # whoever reads it next says what is wrong


def load(path: str | os.PathLike) -> tuple[dict, dict[str, str]]:
  """Reads (params as numpy arrays, header) of a file that `is_native`."""
  with safetensors.safe_open(path, framework="numpy") as file:
    header = file.metadata()
    flat = {name: file.get_tensor(name) for name in file.keys()}
  missing = [key for key in _KEYS if key not in header]
  if missing:
    raise UserError(f"{path}: its header lacks {missing}; export it again")
  return traverse_util.unflatten_dict(flat, sep="/"), header


def check_tree(params: Mapping, expected: Mapping, path) -> None:
  """Names every parameter that is missing, unknown or of another shape."""
  shapes = lambda tree: {
    name: leaf.shape
    for name, leaf in traverse_util.flatten_dict(dict(tree), sep="/").items()
  }
  found, wanted = shapes(params), shapes(expected)
  if found == wanted:
    return
  problems = [
    f"missing {name}" for name in sorted(wanted.keys() - found.keys())
  ]
  problems += [
    f"unknown {name}" for name in sorted(found.keys() - wanted.keys())
  ]
  problems += [
    f"{name} is {found[name]} instead of {wanted[name]}"
    for name in sorted(found.keys() & wanted.keys())
    if found[name] != wanted[name]
  ]
  raise UserError(
    f"{path} does not fit its config: {'; '.join(problems[:20])}"
    + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
  )
