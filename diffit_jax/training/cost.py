"""What a program costs, counted from its jaxpr: multiply-accumulates.

Matrix products and convolutions only; elementwise work is left out, as in the
papers' counts. Loops count as often as they run.
"""

from collections.abc import Callable
import math

import jax
from jax.extend import core


def count_macs(function: Callable, *args) -> int:
  """Multiply-accumulates of one call.

  Args:
    function: of arrays.
    *args: arrays or ShapeDtypeStructs.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      total += eqn.outvars[0].aval.size * math.prod(lhs[i] for i in contract)
    elif eqn.primitive.name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += eqn.outvars[0].aval.size * kernel.size // out_features
    else:
      inner = sum(_count(sub) for sub in _sub_jaxprs(eqn.params))
      total += inner * eqn.params.get("length", 1)
  return total


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
