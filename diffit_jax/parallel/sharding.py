"""Where each array of the training state lies on the mesh."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STACKED = "blocks"  # name of a subtree whose axis 0 counts scanned blocks


def parameter_spec(
  shape: tuple[int, ...], fsdp: int, is_stacked: bool = False
) -> PartitionSpec:
  """Splits the largest dimension that `fsdp` divides; none for small arrays.

  Args:
    shape: of the array.
    fsdp: devices that share it.
    is_stacked: whether axis 0 counts the scanned blocks; it is never split,
      since every device runs every block.
  """
  axes = range(1 if is_stacked else 0, len(shape))
  axes = [axis for axis in axes if fsdp > 1 and shape[axis] % fsdp == 0]
  if len(shape) < 2 + is_stacked or not axes:
    return PartitionSpec()
  axis = max(axes, key=lambda axis: shape[axis])
  return PartitionSpec(*[None] * axis, "fsdp")


def tree_sharding(mesh: Mesh, tree):
  """A NamedSharding for every leaf of a tree of arrays or abstract arrays.

  Parameters, optimizer moments and EMA have the same shapes, so one rule puts
  all three in the same place.
  """
  fsdp = mesh.shape["fsdp"]

  def place(path, leaf):
    is_stacked = any(getattr(key, "key", None) == STACKED for key in path)
    return NamedSharding(mesh, parameter_spec(leaf.shape, fsdp, is_stacked))

  return jax.tree_util.tree_map_with_path(place, tree)


def with_sharding(abstract, sharding):
  """Abstract arrays that carry their sharding, as Orbax restores into."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract,
    sharding,
  )
