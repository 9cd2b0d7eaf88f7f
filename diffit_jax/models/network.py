"""What all networks have in common: the options of `Compute`, declared once."""

import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import (
  PLAIN,
  REMAT_POLICIES,
  Compute,
  Constrain,
  MapParams,
  unconstrained,
)


class Network(nn.Module, kw_only=True):
  """What all networks have in common; attributes as of `Compute`.

  A network tells its attention by `attention_shapes(side) -> [AttentionShape]`,
  side being that of the images or latents.
  """

  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention: str = PLAIN
  constrain: Constrain = unconstrained
  map_params: MapParams | None = None

  @property
  def compute(self) -> Compute:
    """The options as one value, for the modules inside."""
    names = [field.name for field in dataclasses.fields(Compute)]
    return Compute(**{name: getattr(self, name) for name in names})

  def _check_compute(self, side: int, bias_option: str) -> None:
    """Refuses options that are unknown or do not go with the network.

    Args:
      side: of the images or latents.
      bias_option: what decides over the attention's bias.
    """
    if self.remat not in REMAT_POLICIES:
      raise UserError(
        f"model.remat={self.remat!r}: use one of {tuple(REMAT_POLICIES)}"
      )
    shapes = self.attention_shapes(side)
    kernels.check_shapes(self.attention, shapes, bias_option)
