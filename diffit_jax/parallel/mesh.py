"""The one device mesh, with axes `data` and `fsdp`, and batches on it."""

from collections.abc import Iterator
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from diffit_jax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(
  data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices of all processes.

  Args:
    data: replicas of the parameters; -1 is what `fsdp` leaves.
    fsdp: devices that share one copy of the parameters; -1 is what `data`
      leaves. One of the two may be -1.
    devices: the devices; None is all there are.

  Returns:
    A mesh with axes ("data", "fsdp"). Batches are split over both.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp]
  if sizes.count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise UserError(
      f"mesh.data={data} x mesh.fsdp={fsdp} does not make {len(devices)}"
      " devices: the product must be their number, and one may be -1"
    )
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over every device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
  """Refuses a global batch that the devices cannot share equally."""
  if batch_size < 1 or batch_size % mesh.size:
    raise UserError(
      f"{field}={batch_size} cannot be divided over {mesh.size} devices:"
      f" use a multiple of {mesh.size}"
    )


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
