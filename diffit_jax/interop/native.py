"""Our own layout: a safetensors file that says what it is.

Tensor names are the parameter tree's paths joined by "/", values float32 as
trained. The header holds the layout's name, the run's config as JSON, the
training step and the name of the average, so that sampling needs nothing beside
the file. Its "format" is "pt", as in every file that PyTorch's libraries write
and the only one that accelerate and transformers read; files of before that
have the layout's name in its place.
"""

from collections.abc import Mapping
import os
import pathlib

from flax import traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from diffit_jax import whole
from diffit_jax.errors import UserError
from diffit_jax.interop import tensors

LAYOUT = "diffit_jax"
_KEYS = ("config", "step", "ema")


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
  flat = {name: np.ascontiguousarray(array) for name, array in flat.items()}
  metadata = {"format": "pt", "layout": LAYOUT, **header}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole.writing(path) as partial:
      safetensors.numpy.save_file(flat, partial, metadata)
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"writing {path} failed: {error}") from error


def is_native(path: str | os.PathLike) -> bool:
  """Whether `save` wrote it: by its header, or its names where that is lost."""
  try:
    with tensors.open_file(path) as file:
      header, names = file.metadata() or {}, file.keys()
  except UserError:
    return False  # whoever reads it next says what is wrong
  return LAYOUT in (header.get("layout"), header.get("format")) or (
    bool(names) and all("/" in name for name in names)
  )


def load(path: str | os.PathLike) -> tuple[dict, dict[str, str]]:
  """Reads (params as float32 numpy arrays, header) of an `is_native` file.

  Raises:
    UserError: the header lacks something, or tensors are no floats.
  """
  with tensors.open_file(path) as file:
    header, names = file.metadata() or {}, file.keys()
    missing = [key for key in _KEYS if key not in header]
    if missing:
      raise UserError(
        f"{path}: its header lacks {', '.join(missing)}, which export wrote"
        " there: export it again, or convert it with its metadata kept"
      )
    if not header["step"].isdecimal():
      raise UserError(
        f"{path}: its header has step={header['step']!r}, and that is a number"
      )
    dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    wrong = [tensors.wrong_type(*item) for item in dtypes.items()]
    if wrong := list(filter(None, wrong)):
      more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
      raise UserError(f"{path}: {wrong[0]}{more}: export it again")
    flat = {name: tensors.read_float32(file, name) for name in names}
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
