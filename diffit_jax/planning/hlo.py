"""Reads the text of a compiled XLA program, as far as a plan needs it.

A module is a set of computations, one of them the entry; an instruction has a
result (one array or a tuple), operands that are named in the same computation,
and attributes, some of which name other computations:

  %fusion.1 = bf16[16,72]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), calls=%f.2

S(1) is the memory space: 0, which is not written, is HBM; the others are
memories on the chip. {1,0 says that the last dimension lies closest together,
and T(8,128) that the last two are filled up to whole tiles.
"""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import math
import re

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLEES = re.compile(
  r"\b(calls|to_apply|body|true_computation|false_computation"
  r"|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Opcodes whose to_apply is a scalar function, not a part of the program.
_APPLIES = ("call", "async-start")


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result.

  Attributes:
    dtype: as XLA writes it.
    shape: dimensions.
    space: memory space, 0 for HBM.
    tiled: dimensions, filled up to whole tiles; None where there are none.
  """

  dtype: str
  shape: tuple[int, ...]
  space: int = 0
  tiled: tuple[int, ...] | None = None

  @property
  def num_bytes(self) -> int:
    """Without the padding to whole tiles."""
    return self._bytes(self.shape)

  @property
  def tiled_bytes(self) -> int:
    """With the padding to whole tiles."""
    return self._bytes(self.tiled or self.shape)

  def _bytes(self, shape: tuple[int, ...]) -> int:
    size = _BYTES.get(self.dtype)
    if size is None:  # f32, s4, u8, f8e4m3fn: the number is bits
      bits = int(re.match(r"[a-z]+(\d+)", self.dtype).group(1))
      return math.ceil(math.prod(shape) * bits / 8)
    return math.prod(shape) * size


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: without the percent sign.
    opcode: as `all-gather` or `fusion`.
    arrays: the result's arrays, tuples taken apart.
    operands: names.
    argument: text between the parentheses; a constant's value.
    attributes: text behind them.
    is_root: whether it is its computation's result.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  argument: str
  attributes: str
  is_root: bool

  def attribute(self, name: str) -> str | None:
    """The value of an attribute without braces, as in dimensions={0}."""
    found = re.search(rf"\b{name}=(\w+)", self.attributes)
    return found and found.group(1)

  def index(self) -> int:
    """The number of a get-tuple-element or a parameter."""
    text = self.attribute("index") or self.argument
    return int(text)


Computation = dict[str, Instruction]  # by name, in order


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: by name.
    entry: name of the one that runs.
  """

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Reads a module's text.

  Raises:
    ValueError: there is no entry computation in it.
  """
  computations: dict[str, Computation] = {}
  entry, current = None, None
  for line in text.splitlines():
    if not line.startswith(" "):
      header = _HEADER.match(line)
      if header:
        current = computations[header.group(2)] = {}
        entry = header.group(2) if header.group(1) else entry
    elif current is not None and " = " in line:
      instruction = _parse_line(line.strip())
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError("this is not the text of a compiled XLA module")
  return Module(computations, entry)


def parse_arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a type, as in (f32[2]{0}, bf16[3,4]{1,0:T(8,128)S(1)})."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(text):
    shape = tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
    space = re.search(r"S\((\d+)\)", layout)
    number = int(space.group(1)) if space else 0
    found.append(Array(dtype, shape, number, _tiled(shape, layout)))
  return tuple(found)


def _tiled(shape: tuple[int, ...], layout: str) -> tuple[int, ...] | None:
  """A shape in whole tiles: those of {0,1:T(8,128)} end the order 1, 0."""
  match = re.match(r"\{([\d,]+):T\(([\d,]+)\)", layout)
  if not match:
    return None
  order, tile = ([int(x) for x in g.split(",")] for g in match.groups())
  tiled = list(shape)
  for axis, size in zip(order, reversed(tile)):
    tiled[axis] = -(-shape[axis] // size) * size
  return tuple(tiled)


def count_runs(module: Module) -> tuple[Counter, int]:
  """How often each computation runs in one run of the program.

  A conditional counts each of its branches once.

  Returns:
    ({computation: runs}, number of loops of unknown length, taken as one run).
  """
  runs, unknown = Counter(), set()

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for instruction in module.computations[name].values():
      factor = 1
      if instruction.opcode == "while":
        factor = trip_count(module, instruction)
        if factor is None:
          unknown.add(instruction.name)
          factor = 1
      for callee in callees(instruction):
        visit(callee, times * factor)

  visit(module.entry, 1)
  return runs, len(unknown)


def callees(instruction: Instruction) -> Iterator[str]:
  """Computations that an instruction runs, a loop's condition left out."""
  for attribute, names in _CALLEES.findall(instruction.attributes):
    if attribute != "to_apply" or instruction.opcode in _APPLIES:
      yield from _NAME.findall(names)


def trip_count(module: Module, loop: Instruction) -> int | None:
  """Runs of a while loop's body, None if the text does not tell.

  Where the compiler did not write it down, it is the one integer constant that
  the condition compares the counter to; counters start at 0 and go up by 1.
  """
  known = _KNOWN_TRIPS.search(loop.attributes)
  if known:
    return int(known.group(1))
  condition = loop.attributes.partition("condition=%")[2]
  names = [re.match(r"[\w.\-]+", condition).group(0)]
  limits = set()
  for name in names:
    for instruction in module.computations[name].values():
      names.extend(callees(instruction))
      if instruction.opcode == "constant" and not instruction.arrays[0].shape:
        if instruction.arrays[0].dtype in ("s32", "u32", "s64"):
          limits.add(int(instruction.argument))
  return limits.pop() if len(limits) == 1 else None


def _parse_line(line: str) -> Instruction:
  line = re.sub(r"/\*.*?\*/", "", line)
  is_root = line.startswith("ROOT ")
  name, _, rest = line.removeprefix("ROOT ").partition(" = ")
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  argument = rest[start + 1 : end - 1]
  return Instruction(
    name=name.removeprefix("%"),
    opcode=rest[:start],
    arrays=parse_arrays(kind),
    operands=tuple(_NAME.findall(argument)),
    argument=argument,
    attributes=rest[end:],
    is_root=is_root,
  )


def _closing(text: str, start: int) -> int:
  """One past the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r"[()]", text[start:]):
    depth += 1 if match.group() == "(" else -1
    if depth == 0:
      return start + match.end()
  return len(text)
