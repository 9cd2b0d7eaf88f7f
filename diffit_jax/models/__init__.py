"""The networks as linen modules, functions of arrays alone."""

from collections.abc import Mapping
import importlib
import inspect

from flax import linen as nn
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.kernels import PLAIN, serves

__all__ = ["NETWORKS", "ImageDiffiT", "LatentDiffiT", "make_model"]

_DTYPES = ("float32", "bfloat16")
# What stands in config.model.name, by diffusion.kind: "file.class" here. A
# network's file is imported when it is used.
_OF_IMAGES = {
  "image_diffit": "image.ImageDiffiT",
  "ladder": "baselines.ladder.LadderRung",
  "song_unet": "baselines.song_unet.SongUNet",
}
_OF_LATENTS = {
  "latent_diffit": "latent.LatentDiffiT",
  "dit": "baselines.dit.DiT",
}
_FILES = _OF_IMAGES | _OF_LATENTS
NETWORKS = {"edm": _OF_IMAGES, "adm": _OF_LATENTS, "flow": _FILES}
_PUBLIC = {"ImageDiffiT": "image_diffit", "LatentDiffiT": "latent_diffit"}


def network_class(name: str) -> type[nn.Module]:
  """The module class of a `config.model.name`."""
  file, _, attribute = _FILES[name].rpartition(".")
  return getattr(importlib.import_module(f"{__name__}.{file}"), attribute)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return network_class(_PUBLIC[name])


def make_model(config: Mapping) -> nn.Module:
  """The module that `config.model` describes.

  Args:
    config: `name`, one of those above, and the module's own attributes; dtype
      as text, sequences as lists or tuples.

  Raises:
    UserError: an unknown name or field.
  """
  fields = dict(config)
  name = fields.pop("name", None)
  if name not in _FILES:
    raise UserError(f"model.name={name!r}: use one of {sorted(_FILES)}")
  model = network_class(name)
  known = _fields(model)
  for field in fields:
    if field not in known:
      having = [n for n in _FILES if field in _fields(network_class(n))]
      which = f"only {_listed(having)}" if having else f"it has {known}"
      raise UserError(f"{name} has no field model.{field}: {which}")
  kernel = fields.get("attention", PLAIN)
  # By what a model is by default: of its options, it tells when it runs.
  is_served = lambda model: serves(kernel, model().attention_shapes(64))
  if not is_served(model) and (
    having := [n for n in _FILES if is_served(network_class(n))]
  ):
    raise UserError(
      f"{name} has no model.attention={kernel!r}: only {_listed(having)}; use"
      f" model.attention={PLAIN}"
    )
  dtype = fields.get("dtype", "float32")
  if dtype not in _DTYPES:
    raise UserError(f"model.dtype={dtype!r}: use one of {_DTYPES}")
  fields["dtype"] = jnp.dtype(dtype)
  as_tuple = lambda v: tuple(v) if isinstance(v, (list, tuple)) else v
  return model(**{field: as_tuple(value) for field, value in fields.items()})


def _fields(model: type[nn.Module]) -> list[str]:
  return [p for p in inspect.signature(model).parameters if p != "parent"]


def _listed(names: list[str]) -> str:
  """ "a has it", "a and b have it"."""
  *most, last = names
  verb = "have it" if most else "has it"
  return f"{', '.join(most)}{' and ' if most else ''}{last} {verb}"
