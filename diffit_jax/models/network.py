"""What all networks have in common: the options of `Compute`, declared once."""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models import compute as options
from diffit_jax.models import kernels


class Network(nn.Module, kw_only=True):
  """What all networks have in common; attributes as of `Compute`.

  A network tells its attention by `attention_shapes(side) -> [AttentionShape]`,
  side being that of the images or latents.
  """

  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention: str = options.PLAIN
  constrain: options.Constrain = options.unconstrained
  map_params: options.MapParams | None = None

  @property
  def compute(self) -> options.Compute:
    """The options as one value, for the modules inside."""
    names = [field.name for field in dataclasses.fields(options.Compute)]
    return options.Compute(**{name: getattr(self, name) for name in names})

  def _check_compute(self, side: int, bias_option: str) -> None:
    """Refuses options that are unknown or do not go with the network.

    Args:
      side: side of the images or latents.
      bias_option: what decides over the attention's bias.
    """
    allowed = tuple(options.REMAT_POLICIES)
    if self.remat not in allowed:
      raise UserError(f"model.remat={self.remat!r}: use one of {allowed}")
    shapes = self.attention_shapes(side)
    kernels.check_shapes(self.attention, shapes, bias_option)
