"""The one device mesh, with axes `data` and `fsdp`."""

from collections.abc import Sequence
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.parallel import platforms
from diffit_jax.parallel.sharding import AXES


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  num_devices: int = 0,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over all devices of all processes.

  Neighbours along `fsdp` are neighbours in the network, and never in different
  slices: between slices, only the gradients of `data` cross.

  Args:
    data: replicas of the parameters; -1 is what `fsdp` leaves.
    fsdp: devices that share one copy of the parameters; -1 is what `data`
      leaves. One of the two may be -1. With data=-1, where there are fewer
      devices, all of them share one copy.
    num_devices: how many there must be; 0 for any number.
    devices: the devices; None is all there are.

  Returns:
    A mesh with axes ("data", "fsdp"). Batches are split over both.

  Raises:
    UserError: the numbers do not go together, or there are no such devices.
  """
  devices = platforms.wake() if devices is None else devices
  if num_devices not in (0, len(devices)):
    raise UserError(
      f"mesh.num_devices={num_devices} but there are {len(devices)}"
      f" ({devices[0].device_kind}, {jax.process_count()} processes): some"
      " hosts or devices are missing, or the config is another machine's"
    )
  sizes = [data, min(fsdp, len(devices)) if data == -1 else fsdp]
  if sizes.count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise UserError(
      f"mesh.data={data} x mesh.fsdp={fsdp} does not make {len(devices)}"
      " devices: the product must be their number, and one may be -1"
    )
  return Mesh(_arrange(devices, *sizes), AXES)


def _arrange(devices: Sequence[jax.Device], data: int, fsdp: int) -> np.ndarray:
  """The devices as [data, fsdp], following the network's shape."""
  slices = {0}
  if devices[0].platform == "tpu":  # a host of GPUs calls itself a slice, too
    slices = {getattr(device, "slice_index", 0) for device in devices}
  if len(slices) == 1:
    return mesh_utils.create_device_mesh(
      (data, fsdp), devices, allow_split_physical_axes=True
    )
  if data % len(slices):
    raise UserError(
      f"mesh.fsdp={fsdp} spans several of the {len(slices)} slices of"
      f" {len(devices) // len(slices)} devices: use a divisor of that"
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // len(slices), fsdp),
    (len(slices), 1),
    devices,
    allow_split_physical_axes=True,
  )


def check_batch(mesh: Mesh, batch_size: int, field: str) -> None:
  """Refuses a global batch that the devices cannot share equally."""
  if batch_size < 1 or batch_size % mesh.size:
    raise UserError(
      f"{field}={batch_size} cannot be divided over {mesh.size} devices:"
      f" use a multiple of {mesh.size}"
    )
