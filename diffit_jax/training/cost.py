"""What a program costs, counted from its jaxpr: multiply-accumulates.

Matrix products and convolutions only; elementwise work is left out, as in the
papers' counts. Loops count as often as they run.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Macs:
  """Multiply-accumulates of one call.

  Attributes:
    total: of all matrix products and convolutions.
    attention: of q k^T and of the weights times v, which the papers often leave
      out: the products that have batch dimensions.
  """

  total: int
  attention: int

  @property
  def without_attention(self) -> int:
    return self.total - self.attention


def count_macs(function: Callable, *args) -> Macs:
  """Counts the multiply-accumulates of one call.

  Args:
    function: of arrays.
    *args: arrays or ShapeDtypeStructs.
  """
  return Macs(*_count(jax.make_jaxpr(function)(*args).jaxpr))


def _count(jaxpr: core.Jaxpr) -> tuple[int, int]:
  """(all, those of products with batch dimensions)."""
  total = attention = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), (batch, _) = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      macs = eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract)
      total += macs
      attention += macs if batch else 0
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += eqn.outvars[0].aval.size * kernel.size // out_features
    else:
      times = eqn.params.get("length", 1)
      for inner in _sub_jaxprs(eqn.params):
        inner_total, inner_attention = _count(inner)
        total += times * inner_total
        attention += times * inner_attention
  return total, attention


def _sub_jaxprs(params: dict) -> list[core.Jaxpr]:
  """Jaxprs inside an equation; a cond counts every branch."""
  found = []
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else [value]:
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found
