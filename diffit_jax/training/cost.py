"""What a program costs, counted from its jaxpr: multiply-accumulates.

Matrix products and convolutions only; elementwise work is left out, as in the
papers' counts. Loops count as often as they run, and what runs on each device
of a mesh (`shard_map`) as often as there are devices. A Pallas kernel counts as
what it says of itself, which leaves out lanes that are filled up with zeros;
one that says nothing, as often as its grid has steps.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import math

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Macs:
  """Multiply-accumulates of one call.

  Attributes:
    total: those of all matrix products and convolutions.
    attention: those of q k^T and of the weights times v, which papers often
      leave out: the products that have batch dimensions.
  """

  total: int
  attention: int

  @property
  def without_attention(self) -> int:
    return self.total - self.attention


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product or convolution, as often as it runs.

  Attributes:
    macs: multiply-accumulates of all its runs.
    is_batched: whether it has batch dimensions, as attention's products have.
    dtypes: names of the types of its two operands.
    precision: "default", "high" or "highest".
  """

  macs: int
  is_batched: bool
  dtypes: tuple[str, str]
  precision: str


def count_macs(function: Callable, *args) -> Macs:
  """Counts the multiply-accumulates of one call.

  Args:
    function: function of arrays.
    *args: arrays or ShapeDtypeStructs.
  """
  return sum_macs(products(jax.make_jaxpr(function)(*args).jaxpr))


def sum_macs(found: Iterable[Product]) -> Macs:
  """Adds up products."""
  total = attention = 0
  for product in found:
    total += product.macs
    attention += product.macs if product.is_batched else 0
  return Macs(total, attention)


def products(
  jaxpr: core.Jaxpr, times: int = 1, platform: str = ""
) -> Iterator[Product]:
  """All matrix products and convolutions of a program.

  Args:
    jaxpr: the program, with those inside its loops and calls.
    times: how often it runs.
    platform: where it runs, as JAX calls it; "" where that does not matter.
  """
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      is_batched = bool(eqn.params["dimension_numbers"][1][0])
      yield _product(eqn, times * _dot_macs(eqn), is_batched)
    elif eqn.primitive.name == "conv_general_dilated":
      yield _product(eqn, times * _conv_macs(eqn), False)
    elif eqn.params.get("cost_estimate"):
      yield _kernel(eqn, times)
    else:
      inner_times = times * _runs(eqn.params)
      for inner in _sub_jaxprs(eqn.params, platform):
        yield from products(inner, inner_times, platform)


def _runs(params: dict) -> int:
  """How often an equation runs the programs inside it."""
  if "grid_mapping" in params:
    return math.prod(params["grid_mapping"].grid)
  if "newly_manual_axes" in params:
    sizes = params["mesh"].shape
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  return params.get("length", 1)


def _kernel(eqn: core.JaxprEqn, times: int) -> Product:
  """A Pallas kernel as one product; those known so far compute attention."""
  dtype = eqn.invars[0].aval.dtype.name
  macs = times * eqn.params["cost_estimate"].flops // 2
  return Product(macs, True, (dtype, dtype), "highest")


def _product(eqn: core.JaxprEqn, macs: int, is_batched: bool) -> Product:
  dtypes = tuple(var.aval.dtype.name for var in eqn.invars[:2])
  precision = eqn.params["precision"]
  if isinstance(precision, tuple):
    precision = max(precision, key=lambda p: p.value)
  name = "default" if precision is None else precision.name.lower()
  return Product(macs, is_batched, dtypes, name)


def _dot_macs(eqn: core.JaxprEqn) -> int:
  (contract, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract)


def _conv_macs(eqn: core.JaxprEqn) -> int:
  """Zeros of padding count, as in the papers.

  Zeros that are put between the elements of an operand do not. They make the
  gradient of a convolution of stride 2, which costs as much as the convolution.
  """
  kernel = eqn.invars[1].aval
  out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
  with_zeros = eqn.outvars[0].aval.size * kernel.size // out_features
  return with_zeros // math.prod(eqn.params["lhs_dilation"])


def _sub_jaxprs(params: dict, platform: str) -> list[core.Jaxpr]:
  """Jaxprs inside an equation; a cond counts every branch.

  Where the platform chooses the branch, its own counts, or that of all others.
  """
  platforms = params.get("branches_platforms")
  if platforms:
    own = [i for i, names in enumerate(platforms) if platform in (names or ())]
    branch = own[0] if own else platforms.index(None)
    params = {"branches": params["branches"][branch]}
  found = []
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else [value]:
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found
