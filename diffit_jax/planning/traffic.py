"""How many bytes of memory one step reads and writes: three counts of one text.

  touched  operands and results of every instruction, wherever they lie
  hbm      only those that lie in HBM
  tiled    those in HBM, filled up to whole tiles, as they lie there

The compiler keeps part of its arrays in the fast memory on the chip, and says
so in the text. `touched` counts them as XLA's own cost analysis does, and so is
too high for HBM; `hbm` believes the text, counts an array that is moved to the
chip ahead of its use once, as the move, and is the better guess. The two differ
most often by a factor of 2 to 4. None knows of lost bandwidth.

A fused slice of a larger array counts as the slice, and an update in place as
the update. A Pallas kernel counts as its operands and results, and what its
grid reads again, which it says of itself. Loops count as often as they run,
which XLA's cost analysis omits.
"""

from collections.abc import Callable
import dataclasses
import re

from diffit_jax.planning import collectives, hlo

# No bytes move: names for parts of arrays, or the wait for what has started.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "after-all", "iota", "partition-id"),
  *("replica-id", "opt-barrier", "optimization-barrier", "domain"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Inside a fusion: what passes through it, and collectives, counted apart.
_HANDS_ON = {"tuple", "custom-call", *collectives.KINDS}
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")
_KERNEL_BYTES = re.compile(r'tpu_custom_call.*"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes per step and chip.

  Attributes:
    touched: bytes in all memories.
    hbm: bytes in HBM alone.
    tiled: bytes in HBM with the padding to whole tiles.
  """

  touched: int
  hbm: int
  tiled: int


def measure(module: hlo.Module) -> Traffic:
  """Counts the traffic of one run of the program."""
  runs, _ = hlo.count_runs(module)
  inside = _fused(module)
  counts = (
    lambda array: array.num_bytes,
    lambda array: array.num_bytes if array.space == 0 else 0,
    lambda array: array.tiled_bytes if array.space == 0 else 0,
  )
  totals = [0] * len(counts)
  for name, computation in module.computations.items():
    if name in inside or not runs[name]:
      continue
    for line in computation.values():
      for i, size in enumerate(counts):
        totals[i] += runs[name] * _bytes(module, computation, line, size)
  channels = set()
  for name, line in collectives.instructions(module):
    channel = line.attribute("channel_id") or line.name
    if name in inside and runs[name] and channel not in channels:
      channels.add(channel)
      operands = _operands(module.computations[name], line)
      moved = [a for o in (*operands, line) for a in o.arrays]
      for i, size in enumerate(counts):
        totals[i] += runs[name] * sum(map(size, moved))
  return Traffic(*totals)


def _fused(module: hlo.Module) -> set[str]:
  """Computations whose instructions are parts of one instruction."""
  return {
    callee
    for computation in module.computations.values()
    for line in computation.values()
    if line.opcode not in ("while", "conditional", "call")
    for callee in hlo.callees(line)
  }


def _operands(
  computation: hlo.Computation, line: hlo.Instruction
) -> list[hlo.Instruction]:
  return [computation[name] for name in line.operands if name in computation]


def _bytes(
  module: hlo.Module,
  computation: hlo.Computation,
  line: hlo.Instruction,
  size: Callable[[hlo.Array], int],
) -> int:
  """Bytes of one run of one instruction, where `size` counts an array."""
  if line.opcode in _FREE or line.opcode.endswith(("-done", "-update")):
    return 0
  operands = _operands(computation, line)
  arrays = lambda lines: [a for each in lines for a in each.arrays]
  if line.opcode == "fusion":
    (callee,) = hlo.callees(line)
    fused = module.computations[callee]
    return _fusion_bytes(module, fused, operands, line, size)
  if line.opcode in _SLICES:
    return 2 * sum(map(size, line.arrays))
  if line.opcode == "dynamic-update-slice":
    return 2 * sum(map(size, operands[1].arrays))
  if line.opcode in ("copy-start", "slice-start"):
    source, target = _ends(operands, line)
    return sum(_share(size, e, target.num_bytes) for e in (source, target))
  if any(name in line.attributes for name in _FREE_CALLS):
    return 0
  moved = [*arrays(operands), *line.arrays]
  return sum(map(size, moved)) + _read_again(line, moved)


def _read_again(line: hlo.Instruction, moved: list[hlo.Array]) -> int:
  """Bytes that a Pallas kernel's grid reads more than once."""
  said = _KERNEL_BYTES.search(line.attributes)
  once = sum(array.num_bytes for array in moved)
  return max(int(said.group(1)) - once, 0) if said else 0


def _share(size: Callable, array: hlo.Array, part: int) -> int:
  """Bytes of a part of an array, where `size` counts the whole."""
  return part * size(array) // max(array.num_bytes, 1)


def _ends(operands, line) -> tuple[hlo.Array, hlo.Array]:
  """Where an asynchronous copy comes from and where it goes to."""
  source = operands[0].arrays[0]
  arrays = [a for a in line.arrays if a.num_bytes > 4]
  others = [a for a in arrays if a.space != source.space]
  return source, (others or arrays or line.arrays)[0]


def _fusion_bytes(module, fused, operands, line, size) -> int:
  """Bytes between a fusion and memory."""
  total = 0
  for each in fused.values():
    if each.opcode != "parameter" or each.index() >= len(operands):
      continue
    arrays = operands[each.index()].arrays
    if len(arrays) == 1:
      whole = arrays[0].num_bytes
      part = _read(module, fused, each.name, whole)
      total += _share(size, arrays[0], min(whole, part))
  root = next(each for each in fused.values() if each.is_root)
  results = [root]
  if root.opcode == "tuple":
    results = [fused[name] for name in root.operands]
  if len(results) == len(line.arrays):
    for array, result in zip(line.arrays, results):
      written = _written(result, fused, array.num_bytes)
      total += _share(size, array, written)
  return total


def _read(module, fused: hlo.Computation, name: str, whole: int) -> int:
  """Bytes of a value of `whole` bytes that its users in a fusion read."""
  total = 0
  for user in fused.values():
    if name not in user.operands:
      continue
    is_process_0 = user.operands[0] == name
    if user.opcode in _SLICES and is_process_0:
      total += sum(a.num_bytes for a in user.arrays)
    elif user.opcode == "dynamic-update-slice" and is_process_0:
      pass  # updated in place
    elif user.opcode == "bitcast":
      total += _read(module, fused, user.name, whole)
    elif user.opcode == "fusion":
      (callee,) = hlo.callees(user)
      inner = module.computations[callee]
      for each in inner.values():
        if each.opcode == "parameter" and user.operands[each.index()] == name:
          total += _read(module, inner, each.name, whole)
    elif user.opcode in _HANDS_ON:
      pass
    else:
      return whole
  return total


def _written(result, fused, whole: int) -> int:
  """Bytes that a result of a fusion writes."""
  while result.opcode == "bitcast" and result.operands[0] in fused:
    result = fused[result.operands[0]]
  if result.opcode == "dynamic-update-slice":
    return sum(a.num_bytes for a in fused[result.operands[1]].arrays)
  if result.opcode in ("parameter", "custom-call", "get-tuple-element"):
    return 0
  return whole
