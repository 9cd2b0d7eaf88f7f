"""Where each array of the training state lies on the mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def parameter_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """Splits the largest dimension that `fsdp` divides; none for small arrays."""
  divisible = [n for n in shape if fsdp > 1 and n % fsdp == 0]
  if len(shape) < 2 or not divisible:
    return PartitionSpec()
  axis = shape.index(max(divisible))
  return PartitionSpec(*[None] * axis, "fsdp")


def tree_sharding(mesh: Mesh, tree):
  """A NamedSharding for every leaf of a tree of arrays or abstract arrays.

  Parameters, optimizer moments and EMA have the same shapes, so one rule puts
  all three in the same place.
  """
  fsdp = mesh.shape["fsdp"]
  return jax.tree.map(
    lambda leaf: NamedSharding(mesh, parameter_spec(leaf.shape, fsdp)), tree
  )


def with_sharding(abstract, sharding):
  """Abstract arrays that carry their sharding, as Orbax restores into."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract,
    sharding,
  )
