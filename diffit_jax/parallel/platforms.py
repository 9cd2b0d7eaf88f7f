"""Which platform's devices a run takes: TPU, CUDA or CPU.

JAX_PLATFORMS decides. Where it is not set, JAX tries all it knows, and libtpu,
where it is installed without a TPU, complains at length: then libtpu is left
out.
"""

from collections.abc import Sequence
import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import pkgutil

from absl import logging
import jax

from diffit_jax.errors import UserError

# Device files of TPUs: libtpu opens them.
_TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_XLA_BACKEND")


def wake() -> Sequence[jax.Device]:
  """All devices of all processes; call it before anything that needs one.

  Raises:
    UserError: the platform that was asked for is not there, and what is.
  """
  if _may_leave_libtpu_out():
    try:
      return _devices_of("cuda,cpu")  # without a GPU, JAX passes cuda over
    except RuntimeError as error:
      logging.warning("no GPU is used: %s", _reason(error))
      return _devices_of("cpu")
  asked = jax.config.jax_platforms
  try:
    return jax.devices()
  except (AssertionError, RuntimeError) as error:  # JAX's way to say that
    raise UserError(_refusal(asked, error)) from error


def _may_leave_libtpu_out() -> bool:
  """Whether the choice is ours, and between CUDA and the CPU."""
  return not (
    jax.config.jax_platforms  # set by the user, or by JAX where it saw a TPU
    or any(os.environ.get(name) for name in _VARIABLES)
    or "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ
    or any(glob.glob(pattern) for pattern in _TPU_FILES)
    or any("cuda" not in name for name in _plugins())
    or importlib.util.find_spec("libtpu") is None
  )


def _plugins() -> set[str]:
  """Names of the plugins that JAX will find."""
  names = {
    point.name for point in importlib.metadata.entry_points(group="jax_plugins")
  }
  space = importlib.util.find_spec("jax_plugins")
  if space is not None and space.submodule_search_locations:
    folders = list(space.submodule_search_locations)
    names |= {module.name for module in pkgutil.iter_modules(folders)}
  return names


def _devices_of(platforms: str) -> Sequence[jax.Device]:
  jax.config.update("jax_platforms", platforms)
  return jax.devices()


def _refusal(asked: str | None, error: Exception) -> str:
  given = {name: os.environ.get(name) for name in _VARIABLES}
  remedy = "set JAX_PLATFORMS=cpu to run on the CPU"
  if any(given.values()):
    remedy = "take the variable away to use what is there"
  given["JAX_PLATFORMS"] = asked
  request = " ".join(f"{name}={x}" for name, x in given.items() if x)
  return (
    f"{request or 'JAX'} asks for a platform that cannot be started here"
    f" ({_reason(error)}){_what_is_there()}: {remedy}, or install what the"
    " platform needs, as the extras [cuda] and [tpu] do"
  )


def _what_is_there() -> str:
  if jax.distributed.is_initialized():
    return ""  # devices would wait for those of the other processes
  for platforms in ("tpu,cpu", "cuda,cpu", "cpu"):
    if "tpu" in platforms and not any(map(glob.glob, _TPU_FILES)):
      continue
    with contextlib.suppress(AssertionError, RuntimeError):
      found = _devices_of(platforms)[0].device_kind
      return f", and this machine has {found}"
  return ""


def _reason(error: Exception) -> str:
  """JAX's own words without its advice; it has none for a missing GPU."""
  words = (str(error).splitlines() or [""])[0].partition(" (set JAX_")[0]
  return words[:300] or "no such device"
