"""The weights of the FID Inception, from safetensors in PyTorch's layout.

The file is a state dict of the PyTorch port of the graph. Its tensors become
parameters as follows:

  X.conv.weight [out, in, h, w]          w
  X.bn.weight, X.bn.bias                 gamma, beta
  X.bn.running_mean, X.bn.running_var    mean, var

  s = gamma / sqrt(var + 0.001)                                          (1)
  X/kernel [h, w, in, out] = w s,  X/bias = beta - mean s                (2)

  fc.weight [1008, 2048] -> fc/kernel [2048, 1008]; fc.bias is not used (3)

where the dots of X become the levels of the tree. X.bn.num_batches_tracked is
ignored. (1) and (2) are computed in float64 from the float32 values of the
file's numbers, whatever their type.
"""

from collections.abc import Mapping
import functools
import hashlib
import os
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import inception
from diffit_jax.interop import tensors

BN_EPSILON = 0.001
_BN = ("weight", "bias", "running_mean", "running_var")
_IGNORED = ".num_batches_tracked"


@functools.cache
def expected_shapes() -> dict[str, tuple[int, ...]]:
  """Name and shape of every tensor that a file must hold, 472 of them."""
  x = jax.ShapeDtypeStruct((1, inception.SIDE, inception.SIDE, 3), "float32")
  key = jax.random.key(0, impl=PRNG)
  init = jax.eval_shape(inception.Inception().init, key, x)
  shapes = {
    "fc.weight": (inception.NUM_LOGITS, inception.POOL_DIM),
    "fc.bias": (inception.NUM_LOGITS,),
  }
  for path, leaf in traverse_util.flatten_dict(init["params"]).items():
    if path[-1] == "kernel" and path[0] != "fc":
      name, (h, w, c_in, c_out) = ".".join(path[:-1]), leaf.shape
      shapes[f"{name}.conv.weight"] = (c_out, c_in, h, w)
      shapes |= {f"{name}.bn.{part}": (c_out,) for part in _BN}
  return shapes


def read_state(
  path_or_state: str | os.PathLike | Mapping,
) -> dict[str, np.ndarray]:
  """The tensors of a file or of a dict, with names and shapes checked.

  Args:
    path_or_state: a safetensors file, or {name: array}.

  Returns:
    {name: array} of `expected_shapes`, in float32.

  Raises:
    UserError: no such file, a pickle, not a whole safetensors file, or tensors
      are missing, unexpected, of another shape or dtype, or not finite.
  """
  if isinstance(path_or_state, Mapping):
    what, state = "the state dict given as Inception", dict(path_or_state)
    state = {n: a for n, a in state.items() if not n.endswith(_IGNORED)}
    _check_shapes(what, {n: np.shape(a) for n, a in state.items()})
    state = {n: _to_float32(what, n, a) for n, a in state.items()}
  else:
    what = pathlib.Path(path_or_state)
    state = _read_file(what)
  _check_values(what, state)
  return state


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise UserError(
      f"{path} is not there: the FID Inception is not part of this project;"
      " get pt_inception-2015-12-05-6726825d.pth from the releases of"
      " github.com/mseitz/pytorch-fid, convert it where PyTorch is installed:"
      f" {tensors.conversion('pt_inception-2015-12-05-6726825d.pth', path)} and"
      " give the result as --inception=FILE"
    )
  with tensors.open_file(path) as file:
    names = [n for n in file.keys() if not n.endswith(_IGNORED)]
    headers = {name: file.get_slice(name) for name in names}
    _check_shapes(path, {n: tuple(h.get_shape()) for n, h in headers.items()})
    for name, header in headers.items():
      if wrong := tensors.wrong_type(name, header.get_dtype()):
        raise UserError(f"{path}: {wrong}")
    return {name: tensors.read_float32(file, name) for name in names}


def _to_float32(what, name: str, array) -> np.ndarray:
  array = np.asarray(array)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise UserError(f"{what}: {name} is {array.dtype} instead of float32")
  return array.astype(np.float32, copy=False)


def _check_shapes(what, found: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError that counts and names the tensors that do not fit."""
  wanted = expected_shapes()
  missing = [n for n in wanted if n not in found]
  unexpected = sorted(n for n in found if n not in wanted)
  shaped = [
    f"{n} is {tuple(found[n])} instead of {shape}"
    for n, shape in wanted.items()
    if n in found and tuple(found[n]) != shape
  ]
  problems = [
    f"{len(names)} {kind} ({', '.join(names[:3])}"
    f"{', ...' if len(names) > 3 else ''})"
    for kind, names in (
      ("missing", missing),
      ("unexpected", unexpected),
      ("of another shape", shaped),
    )
    if names
  ]
  if problems:
    raise UserError(
      f"{what} does not hold the FID Inception of 2015: of"
      f" {len(wanted)} tensors {'; '.join(problems)}"
    )


def _check_values(what, state: Mapping[str, np.ndarray]) -> None:
  for name, array in state.items():
    if not np.isfinite(array).all():
      raise UserError(f"{what}: {name} holds values that are not finite")
    if name.endswith(".running_var") and array.min() < 0:
      raise UserError(f"{what}: {name} holds negative variances")


def digest(state: Mapping[str, np.ndarray]) -> str:
  """SHA-256 of names and float32 values, the same from a file or a dict."""
  sha = hashlib.sha256()
  for name in sorted(state):
    sha.update(name.encode() + b"\0")
    sha.update(np.ascontiguousarray(state[name], "<f4").data)
  return sha.hexdigest()


def fold(state: Mapping[str, np.ndarray], dtype=np.float32) -> dict:
  """Equations (1) to (3): the nested dict of parameters, in `dtype`."""
  double = functools.partial(np.asarray, dtype=np.float64)
  flat = {"fc.kernel": double(state["fc.weight"]).T}
  for key in state:
    if key.endswith(".conv.weight"):
      name = key.removesuffix(".conv.weight")
      gamma, beta, mean, var = (
        double(state[f"{name}.bn.{part}"]) for part in _BN
      )
      scale = gamma / np.sqrt(var + BN_EPSILON)
      flat[f"{name}.kernel"] = double(state[key]).transpose(2, 3, 1, 0) * scale
      flat[f"{name}.bias"] = beta - mean * scale
  flat = {n: np.ascontiguousarray(a, dtype) for n, a in flat.items()}
  return traverse_util.unflatten_dict(flat, sep=".")
