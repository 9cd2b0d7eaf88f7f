"""Where each array of a training run lies on the mesh.

Parameters, optimizer moments and averages follow one list of rules, matched
against their path. Each device stores its part of them; a block gathers its
weights where it uses them (`gather`), in the type that it computes in, so that
no activation ever moves: batches stay split over all devices throughout.
"""

from collections.abc import Callable, Iterator, Mapping
import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp")  # of the mesh
STACKED = "blocks"  # name of a subtree whose axis 0 counts scanned blocks
LARGEST = "largest"  # split the largest dimension that `fsdp` divides

# (regex that is searched in "path/of/the/array", its placement), first match
# wins. A placement is LARGEST or a PartitionSpec for the last dimensions. The
# scan axis of stacked blocks is never split: every device runs every block.
Rules = tuple[tuple[str, str | PartitionSpec], ...]
RULES: Rules = (
  (r"/(bias|scale)$", PartitionSpec()),  # small: a whole copy on every device
  (r"", LARGEST),
)


def parameter_spec(
  path: str, shape: tuple[int, ...], fsdp: int, rules: Rules = RULES
) -> PartitionSpec:
  """The placement of one array.

  Args:
    path: keys joined by "/".
    shape: shape of the array.
    fsdp: devices that share it.
    rules: the first that matches decides.

  Raises:
    ValueError: no rule matches, or the rule's dimensions do not divide.
  """
  matching = (rule for regex, rule in rules if re.search(regex, f"/{path}"))
  placement = next(matching, None)
  if placement is None:
    raise ValueError(f"no sharding rule matches {path}")
  first = 1 if f"/{STACKED}/" in f"/{path}/" else 0
  if placement == LARGEST:
    axes = [i for i in range(first, len(shape)) if shape[i] % fsdp == 0]
    if fsdp == 1 or not axes:
      return PartitionSpec()
    axis = max(axes, key=lambda i: shape[i])
    return PartitionSpec(*[None] * axis, "fsdp")
  lead = len(shape) - len(placement)
  split = [i for i, name in enumerate(placement) if name == "fsdp"]
  if lead < first or any(shape[lead + i] % fsdp for i in split):
    raise ValueError(f"the rule {placement} does not fit {path} {shape}")
  return PartitionSpec(*[None] * lead, *placement) if split else PartitionSpec()


def tree_sharding(mesh: Mesh, tree, rules: Rules = RULES):
  """A NamedSharding for every leaf of a tree of arrays or abstract arrays.

  Moments and averages end in the paths of their parameters, so the rules put
  all of them in the same place.
  """
  fsdp = mesh.shape["fsdp"]

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, parameter_spec(name, leaf.shape, fsdp, rules))

  return jax.tree_util.tree_map_with_path(place, tree)


def with_sharding(abstract, sharding):
  """Abstract arrays that carry their sharding, as Orbax restores into."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    abstract,
    sharding,
  )


def constrain_batch(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """The function that keeps an activation [b, ...] split over all devices."""
  split = batch_sharding(mesh)
  return lambda x: jax.lax.with_sharding_constraint(x, split)


def per_device(mesh: Mesh) -> Callable:
  """The function that runs another on each device's part of the batch.

  It takes (x [b, ...], y) -> [b, ...] to one that the compiler need not split.
  y is whole on every device, and so its gradient is summed over all of them.
  """
  split, whole = PartitionSpec(AXES), PartitionSpec()
  return lambda run: jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(split, whole),
    out_specs=split,
    check_vma=False,  # a Pallas kernel does not say how its results vary
  )


def gather(mesh: Mesh, dtype: jnp.dtype | None = None) -> Callable | None:
  """The function that makes whole copies of parameters where they are used.

  None where every device has them whole: a copy in a block would be one more
  thing that the block saves for its backward pass.

  Args:
    mesh: their devices.
    dtype: kernels and their biases are cast to it before they travel, which is
      half the bytes in bfloat16; None leaves all as they are.
  """
  if mesh.shape["fsdp"] == 1:
    return None
  whole = replicated(mesh)

  def gather_tree(tree):
    if not isinstance(tree, Mapping):
      return jax.lax.with_sharding_constraint(tree, whole)
    is_linear = dtype is not None and "kernel" in tree
    cast = lambda leaf: leaf.astype(dtype) if is_linear else leaf
    return {name: gather_tree(cast(value)) for name, value in tree.items()}

  return gather_tree


def gather_outside_blocks(mesh: Mesh, params: Mapping) -> dict:
  """Gathers what no block of a model would gather: its ends and embeddings."""
  whole = gather(mesh)
  if whole is None:
    return dict(params)
  return {
    name: subtree if "block" in name else whole(subtree)
    for name, subtree in params.items()
  }


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over every device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Puts an array that every process holds whole where `sharding` says.

  Unlike `jax.device_put` it asks no other process whether theirs is the same.
  """
  array = np.asarray(array)
  part = lambda index: array[index]
  return jax.make_array_from_callback(array.shape, sharding, part)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Copies this process's part of a batch to its devices, without waiting."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }


def put_ahead(
  mesh: Mesh, batches: Iterator[dict[str, np.ndarray]]
) -> Iterator[dict[str, jax.Array]]:
  """`put_batch` of each batch, one batch before it is asked for."""
  ahead = put_batch(mesh, next(batches))
  for batch in batches:
    current, ahead = ahead, put_batch(mesh, batch)
    yield current
