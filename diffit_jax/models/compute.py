"""How a network computes, apart from what it computes.

`Network` declares these options once, for the user of every network; its
modules hand them on as one `Compute`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models import kernels

# Says where an activation [b, ...] lies on the devices, or returns it as it is.
Constrain = Callable[[jax.Array], jax.Array]
# Parameters of one block as they are stored -> as the block computes with them.
MapParams = Callable[[Any], Any]

# What the backward pass finds saved of each block, from the fewest FLOPs to the
# most; None is everything.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def unconstrained(x: jax.Array) -> jax.Array:
  """The `Constrain` that leaves it to the compiler."""
  return x


@dataclasses.dataclass(frozen=True)
class Compute:
  """Options that change how fast and how exactly a network computes.

  Attributes:
    dtype: of matrix products and the residual stream; softmax, norms and the
      attention's bias are float32.
    attention: a key of `KERNELS`.
    remat: what each block recomputes in the backward pass, a key of
      REMAT_POLICIES: "none"; "dots", all but the products with weights; "full".
    constrain: applied to activations, to say where they lie on the devices.
    map_params: applied to each block's parameters where they are used, to
      gather them from the devices that share them; None for as they are.
  """

  dtype: jnp.dtype = jnp.float32
  attention: str = kernels.PLAIN
  remat: str = "none"
  constrain: Constrain = unconstrained
  map_params: MapParams | None = None

  def transform(
    self, block: type[nn.Module], prevent_cse: bool = True
  ) -> type[nn.Module]:
    """A block that recomputes in the backward pass and maps its parameters.

    The parameters are mapped inside what is recomputed, so that a copy gathered
    from many devices lives no longer than the block runs.

    Args:
      block: module class.
      prevent_cse: as in `jax.checkpoint`; a loop does not need it.
    """
    if self.map_params is not None:
      block = nn.map_variables(block, "params", trans_in_fn=self.map_params)
    policy = REMAT_POLICIES[self.remat]
    if policy is None:
      return block
    return nn.remat(block, policy=policy, prevent_cse=prevent_cse)


class Network(nn.Module, kw_only=True):
  """What all networks have in common; attributes as of `Compute`.

  A network tells its attention by `attention_shapes(side) -> [AttentionShape]`,
  side being that of the images or latents.
  """

  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention: str = kernels.PLAIN
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
