"""The networks as linen modules, functions of arrays alone."""

from collections.abc import Mapping
import inspect

from flax import linen as nn
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.baselines.dit import DiT
from diffit_jax.models.baselines.ladder import LadderRung
from diffit_jax.models.baselines.song_unet import SongUNet
from diffit_jax.models.image import ImageDiffiT
from diffit_jax.models.kernels import PLAIN, serves
from diffit_jax.models.latent import LatentDiffiT

__all__ = ["NETWORKS", "ImageDiffiT", "LatentDiffiT", "make_model"]

_DTYPES = ("float32", "bfloat16")
# What stands in config.model.name, by diffusion.kind.
NETWORKS = {
  "edm": {
    "image_diffit": ImageDiffiT,
    "ladder": LadderRung,
    "song_unet": SongUNet,
  },
  "adm": {"latent_diffit": LatentDiffiT, "dit": DiT},
}
_MODELS = NETWORKS["edm"] | NETWORKS["adm"]


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
  if name not in _MODELS:
    raise UserError(f"model.name={name!r}: use one of {sorted(_MODELS)}")
  model = _MODELS[name]
  known = _fields(model)
  for field in fields:
    if field not in known:
      having = [n for n, other in _MODELS.items() if field in _fields(other)]
      which = f"only {_listed(having)}" if having else f"it has {known}"
      raise UserError(f"{name} has no field model.{field}: {which}")
  kernel = fields.get("attention", PLAIN)
  # By what a model is by default: of its options, it tells when it runs.
  having = [
    n for n, m in _MODELS.items() if serves(kernel, m().attention_shapes(64))
  ]
  if having and name not in having:
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
