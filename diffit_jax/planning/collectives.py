"""What moves between chips in one step, read from the compiled program.

Each chip sends, over a ring of n chips, for an operand of B bytes on each
(Patarasuk and Yuan, 2009):

  all-gather          (n - 1) B
  reduce-scatter      (n - 1) B / n
  all-reduce          2 (n - 1) B / n
  all-to-all          (n - 1) B / n
  collective-permute  B

An asynchronous collective stands in the text up to a dozen times, once in every
fusion that it runs beside; all of them have the same channel, which counts once
for every run of the loop body that holds it.

Between slices libtpu's program reduces within each slice first, and then sends
every chip's part over the data-center network, as `send` to the "megascale"
runtime; that counts as a collective of one chip per slice.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

import numpy as np

from diffit_jax.planning import hlo

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of the program.

  Attributes:
    kind: one of KINDS.
    runs: per step.
    num_bytes: size of its operands on each chip.
    group_size: chips that take part in it together.
    num_slices: slices that they lie in.
  """

  kind: str
  runs: int
  num_bytes: int
  group_size: int
  num_slices: int = 1

  @property
  def wire_bytes(self) -> float:
    """Bytes that each chip sends to chips of its slice in one step."""
    per_slice = self.group_size // self.num_slices
    return self.runs * ring_bytes(self.kind, self.num_bytes, per_slice)

  @property
  def dcn_bytes(self) -> float:
    """Bytes that each chip sends to other slices in one step.

    As if the chips of a slice reduced first, and each then sent its part.
    """
    per_slice = self.group_size // self.num_slices
    part = self.num_bytes / (1 if self.kind == "all-gather" else per_slice)
    return self.runs * ring_bytes(self.kind, part, self.num_slices)


def ring_bytes(kind: str, num_bytes: float, n: int) -> float:
  """Bytes that each of `n` chips sends, as in the module docstring."""
  factor = {
    "all-gather": n - 1,
    "reduce-scatter": (n - 1) / n,
    "all-reduce": 2 * (n - 1) / n,
    "all-to-all": (n - 1) / n,
    "collective-permute": 1.0 if n > 1 else 0.0,
  }
  return factor[kind] * num_bytes


def find(
  module: hlo.Module, num_chips: int, num_slices: int = 1
) -> list[Collective]:
  """All collectives of a program.

  Args:
    module: the program, as compiled for many devices.
    num_chips: devices of the program.
    num_slices: equal runs of devices that are slices.
  """
  runs, _ = hlo.count_runs(module)
  found: dict[tuple[str, str], Collective] = {}
  for computation, line in instructions(module):
    times = runs[computation]
    if not times:
      continue
    lines = module.computations[computation]
    operands = [lines[name] for name in line.operands if name in lines]
    collective = Collective(
      _kind(line),
      times,
      sum(array.num_bytes for each in operands for array in each.arrays),
      *_extent(line, num_chips, num_slices),
    )
    key = (collective.kind, line.attribute("channel_id") or line.name)
    if key not in found or found[key].runs < times:
      found[key] = collective
  return list(found.values())


def instructions(module: hlo.Module) -> Iterator[tuple[str, hlo.Instruction]]:
  """(computation, instruction) of all collectives in the text."""
  for name, computation in module.computations.items():
    for line in computation.values():
      if _kind(line) in KINDS:
        yield name, line


def _kind(line: hlo.Instruction) -> str:
  """The kind, one of KINDS, of a collective."""
  if line.opcode == "send":
    sent = re.search(r'_megascale_transfer_type="(\w+)"', line.attributes)
    kind = sent.group(1).lower().replace("_", "-") if sent else "send"
    return "collective-permute" if kind == "one-to-one" else kind
  return line.opcode.removesuffix("-start")


def _extent(
  line: hlo.Instruction, num_chips: int, num_slices: int
) -> tuple[int, int]:
  """(chips that take part together, slices that they lie in)."""
  if line.opcode == "send":
    return num_slices, num_slices
  groups = _groups(line, num_chips)
  slices = groups // max(num_chips // num_slices, 1)
  return groups.shape[1], max(len(set(row)) for row in slices.tolist())


def count(found: list[Collective]) -> dict[str, int]:
  """{kind: runs per step}, every kind named."""
  runs = dict.fromkeys(KINDS, 0)
  for collective in found:
    runs[collective.kind] += collective.runs
  return runs


def _groups(line: hlo.Instruction, num_chips: int) -> np.ndarray:
  """[groups, n] devices that take part together; all of them if not said."""
  text = line.attributes
  everyone = np.arange(num_chips)[None]
  if "source_target_pairs=" in text:
    pairs = re.findall(
      r"\{(\d+),(\d+)\}", text.partition("source_target_pairs=")[2]
    )
    return np.array(pairs, int) if pairs else everyone
  text = text.partition("replica_groups=")[2]
  for pattern, read in (
    (r"\{\{([\d,{} ]+)\}\}", _listed),
    (r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", _iota),
    (r"mesh\[([^\]]*)\](?:, device_ids=\(([^)]*)\))? ?\{([^}]*)\}", _mesh),
  ):
    match = re.match(pattern, text)
    if match:
      return read(*match.groups())
  return everyone


def _listed(text: str) -> np.ndarray:
  """{{0,1},{2,3}}."""
  return np.array([row.split(",") for row in re.split(r"\},\s*\{", text)], int)


def _iota(shape: str, dims: str, order: str | None) -> np.ndarray:
  """[2,4]<=[4,2]T(1,0): counted off over dims, transposed, reshaped."""
  dims = _ints(dims)
  order = _ints(order) if order else range(len(dims))
  devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
  return devices.reshape(_ints(shape))


def _mesh(axes: str, device_ids: str | None, used: str) -> np.ndarray:
  """mesh['data'=4,'fsdp'=16] {'fsdp'}: one group for each place on the rest.

  A part of an axis is written 'fsdp':(2)4, its 4 middle places of a stride of
  16 / (2 x 4) for an axis of 16.
  """
  sizes = {n: int(s) for n, s in re.findall(r"'([^']*)'=(\d+)", axes)}
  parts: dict[str, tuple[int, int, int]] = {}
  for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", used):
    before, size = int(before or 1), int(size or sizes[name])
    parts[name] = (before, size, sizes[name] // (before * size))
  shape, front, back = [], [], []
  for name, size in sizes.items():
    for place, length in enumerate(parts.get(name, (size,))):
      (front if name in parts and place == 1 else back).append(len(shape))
      shape.append(length)
  devices = np.arange(math.prod(sizes.values()))
  if device_ids and "<=" not in device_ids and re.search(r"\d", device_ids):
    ids = _ints(device_ids)
    devices = np.array(ids) if len(ids) == devices.size else devices
  group = math.prod(shape[i] for i in front)
  return devices.reshape(shape).transpose(back + front).reshape(-1, group)


def _ints(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
