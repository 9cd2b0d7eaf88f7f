"""How a network computes, apart from what it computes."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

PLAIN = "xla"  # the kernel that serves everything; see `kernels`
AUTO = "auto"  # the kernel that `kernels.choose` takes; plain where none did
# Says where an activation [b, ...] lies on the devices, or returns it as it is.
Constrain = Callable[[jax.Array], jax.Array]
# (x [b, ...], y) -> [b, ...], to be run on each device's part of the batch.
PerDevice = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]
# Parameters of one block as they are stored -> as the block computes with them.
MapParams = Callable[[Any], Any]

# What a fused kernel calls its output, for REMAT_POLICIES.
OUTPUT = "attention_output"
_policies = jax.checkpoint_policies

# What the backward pass finds saved of each block, from the fewest FLOPs to the
# most; None is everything.
REMAT_POLICIES = {
  "none": None,
  "dots": _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable,
    _policies.save_only_these_names(OUTPUT),
  ),
  "full": _policies.nothing_saveable,
}


def as_it_is(x):
  """The `Constrain` and `PerDevice` that leave it to the compiler."""
  return x


@dataclasses.dataclass(frozen=True)
class Compute:
  """Options that change how fast and how exactly a network computes.

  Attributes:
    dtype: type of matrix products and the residual stream; softmax, norms and
      the attention's bias are float32.
    attention: a key of `KERNELS`.
    remat: what each block recomputes in the backward pass, a key of
      REMAT_POLICIES: "none"; "dots", all but the products with weights; "full".
    constrain: applied to activations, to say where they lie on the devices.
    per_device: applied to a kernel that is to run on each device by itself.
    map_params: applied to each block's parameters where they are used, to
      gather them from the devices that share them; None for as they are.
  """

  dtype: jnp.dtype = jnp.float32
  attention: str = PLAIN
  remat: str = "none"
  constrain: Constrain = as_it_is
  per_device: PerDevice = as_it_is
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
