"""TPU slices and fake CPU devices by name, and what one chip can do.

libtpu describes and compiles for slices that are not there. It is told so
through environment variables, which must be set before it is loaded.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import re

from diffit_jax.errors import UserError

EXAMPLES = (
  *("v5e:1x1", "v5e:2x4", "v5e:4x4", "v5e:16x16", "v6e:8x8", "v5p:2x2x4"),
  *("v5p:4x4x4", "v4:2x2x2", "2xv5e:4x4 (two slices)", "cpu:8"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    bf16_flops: peak FLOP/s of bfloat16 products.
    hbm_bytes: memory that a program may use, as libtpu 0.0.52 compiles for it.
    hbm_bandwidth: byte/s.
    ici_bandwidth: byte/s that all links to neighbours send, in one direction.
    ici_axes: axes of the torus; a chip has two links along each.
    dcn_bandwidth: byte/s of the chip's share of its host's network.
    max_chips: number of chips of a pod, the largest slice.
  """

  bf16_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_bandwidth: float
  ici_axes: int
  dcn_bandwidth: float
  max_chips: int


_GIB = 2**30
# FLOP/s, HBM and pod sizes: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, table
# "key specifications". ICI: half the "bidirectional ICI bandwidth per chip" of
# the same pages; for v4, which has none there, 6 links of 50 GB/s (Jouppi et
# al. 2023, arXiv 2304.01433, Table 4). DCN: "data center network bandwidth" per
# pod over its chips (v5e 6.4 Tb/s, v6e 25.6 Tb/s over 256) or per chip (v5p 50
# Gb/s); none is published for v4, which is taken to be as v5p. Memory: the
# "available HBM" in libtpu's own error message, a little below the capacity.
CHIPS = {
  "v4": Chip(275e12, 30.75 * _GIB, 1200e9, 300e9, 3, 6.25e9, 4096),
  "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 200e9, 2, 3.125e9, 256),
  "v5p": Chip(459e12, 95.73 * _GIB, 2765e9, 600e9, 3, 6.25e9, 8960),
  "v6e": Chip(918e12, 31.24 * _GIB, 1600e9, 400e9, 2, 12.5e9, 256),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """What a program is compiled for.

  Attributes:
    name: as the user wrote it.
    kind: "cpu", or a key of CHIPS.
    shape: shape of one slice, in chips.
    num_slices: slices.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def num_chips(self) -> int:
    return self.num_slices * math.prod(self.shape)

  @property
  def chip(self) -> Chip | None:
    """None for a CPU, about which no table says anything."""
    return CHIPS.get(self.kind)


def parse(name: str) -> Topology:
  """Reads kind:AxB or kind:AxBxC, with the number of slices as 2xkind:AxB.

  Raises:
    UserError: the name is not one of a slice, listing some that are.
  """
  match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name)
  if not match:
    raise _unknown(name, "write kind:AxB, the chips along each side")
  slices, kind, shape = match.groups()
  shape, slices = tuple(map(int, shape.split("x"))), int(slices or 1)
  if min(*shape, slices, 1) < 1:
    raise _unknown(name, "it has no chips")
  if kind == "cpu":
    if len(shape) > 1 or slices > 1:
      raise _unknown(name, "CPU devices are a plain number")
    return Topology(name, kind, shape)
  if kind not in CHIPS:
    raise _unknown(name, f"{kind!r} is none of {', '.join(CHIPS)}")
  chip = CHIPS[kind]
  if len(shape) != chip.ici_axes:
    raise _unknown(name, f"a slice of {kind} has {chip.ici_axes} sides")
  if math.prod(shape) > chip.max_chips:
    raise _unknown(name, f"a pod of {kind} has {chip.max_chips} chips")
  return Topology(name, kind, shape, slices)


# Without the first three, libtpu asks the machine for a TPU and complains; its
# lock would keep a second process from planning at the same time.
LIBTPU_ENVIRONMENT = {
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare_environment(topology: Topology) -> None:
  """Sets what jax and libtpu read when they start; call it before."""
  os.environ.update(LIBTPU_ENVIRONMENT)
  os.environ["JAX_PLATFORMS"] = "cpu"
  # A program of devices that are not there cannot be loaded from a cache, and
  # one that was says nothing of its memory.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  flag = "--xla_force_host_platform_device_count"
  flags = os.environ.get("XLA_FLAGS", "")
  if topology.kind == "cpu" and flag not in flags:
    count = f"{flag}={topology.num_chips}"
    os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()


def devices(topology: Topology) -> Sequence:
  """The devices to compile for; none of them can run anything but a CPU.

  Raises:
    UserError: libtpu is not installed, or knows no such slice.
  """
  import jax

  if topology.kind == "cpu":
    found = jax.devices("cpu")
    if len(found) < topology.num_chips:
      raise UserError(
        f"--topology={topology.name}: jax started with {len(found)} CPU devices"
        " already; XLA_FLAGS=--xla_force_host_platform_device_count="
        f"{topology.num_chips} gives more"
      )
    return found[: topology.num_chips]
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"--topology={topology.name} needs libtpu: pip install"
      " '.[plan]', or plan for CPU devices with --topology=cpu:8"
    ) from error
  from jax.experimental import topologies

  options = {}
  if topology.num_slices > 1:
    options["num_slices"] = topology.num_slices
  if topology.kind == "v4":
    # One device per chip, its two cores working as one, as Cloud TPU has it;
    # libtpu's default is a device for each core.
    options["chip_config_name"] = "megacore"
  sides = "x".join(map(str, topology.shape))
  name = f"{topology.kind}:{sides}"
  try:
    return topologies.get_topology_desc(name, "tpu", **options).devices
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0].partition(": ")[2]
    raise _unknown(topology.name, reason) from error


def _unknown(name: str, reason: str) -> UserError:
  return UserError(
    f"--topology={name!r}: {reason}; valid are for example"
    f" {', '.join(EXAMPLES)}"
  )
