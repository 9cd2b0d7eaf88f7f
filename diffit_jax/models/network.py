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
  constrain: options.Constrain = options.as_it_is
  per_device: options.PerDevice = options.as_it_is
  map_params: options.MapParams | None = None

  @property
  def compute(self) -> options.Compute:
    """The options as one value, for the modules inside."""
    names = [field.name for field in dataclasses.fields(options.Compute)]
    fields = {name: getattr(self, name) for name in names}
    if self.attention == options.AUTO:
      fields["attention"] = options.PLAIN
    return options.Compute(**fields)

  @property
  def bias_option(self) -> str:
    """What decides over the attention's bias, as a message names it."""
    return type(self).__name__

  def check_compute(self, side: int) -> None:
    """Refuses options that are unknown or do not go with the network.

    Args:
      side: side of the images or latents.
    """
    allowed = tuple(options.REMAT_POLICIES)
    if self.remat not in allowed:
      raise UserError(f"model.remat={self.remat!r}: use one of {allowed}")
    shapes = self.attention_shapes(side)
    kernels.check_shapes(self.attention, shapes, self.bias_option)
