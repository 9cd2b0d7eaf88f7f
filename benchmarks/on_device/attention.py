"""Stage `attention`: the probe's verdict on fused kernels, and their times."""

import functools
import time

import jax
import jax.numpy as jnp

from benchmarks.on_device import device, rows
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import Compute
from diffit_jax.models.kernels import probe as probe_lib

card = device.card

# (heads, width of a head, side) of imagenet256 and 512, and of ffhq64's levels.
PROBED = ((16, 72, 16), (16, 72, 32), (2, 64, 8), (4, 64, 8))
TIMED = ((64, 16), (16, 32))  # (batch, side): 256 and 1,024 tokens


def measure(record: rows.Record) -> None:
  heads, width = (2, 8) if record.is_tiny else (16, 72)
  for name in device.attentions():
    for sizes in [(heads, width, 4)] if record.is_tiny else PROBED:
      case = "{}, {} heads of {}, {}x{} tokens".format(name, *sizes, sizes[-1])
      run = functools.partial(probe, name, *sizes)
      if name != kernels.PLAIN:
        record.attempt(case, run, 5, table="probe")
  for batch, side in [(2, 4)] if record.is_tiny else TIMED:
    for name, reason in device.attentions().items():
      about = {"attention": name, "batch": batch, "tokens": side**2}
      if reason:
        record.add("TMSA", **about, skipped=reason)
        continue
      layer = Layer(name, batch, heads, side, width)
      record.attempt("TMSA", layer.times, **about)


def probe(name: str, heads: int, width: int, side: int) -> dict:
  start = time.perf_counter()
  shape = kernels.AttentionShape(side**2, heads, width, "shared")
  try:
    probe_lib.probe(name, shape)
    verdict = "passes"
  except UserError as error:
    verdict = str(error)
  return {"verdict": verdict, "s": time.perf_counter() - start}


class Layer:
  """The attention of one layer, without its projections, in bfloat16."""

  def __init__(self, name: str, b: int, heads: int, side: int, width: int):
    self.sizes = b, heads, side, width
    compute = Compute(attention=name)
    self.attend = lambda qkv, table: kernels.attend(
      qkv, table, heads, side, compute
    )

  def times(self) -> dict:
    """Forward, and with the gradients of qkv and of the bias's table."""
    b, heads, side, width = self.sizes
    n, c = side**2, heads * width
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    token = lambda i, c: draw(i, b, side, side, c).astype(jnp.bfloat16)
    qkv, weight = token(0, 3 * c), token(1, c)
    table = draw(2, (2 * side - 1) ** 2, heads)
    loss = lambda *args: jnp.sum(
      (self.attend(*args) * weight).astype(jnp.float32)
    )
    runs = {
      "forward ms": self.attend,
      "gradient ms": jax.grad(loss, (0, 1)),
    }
    row, compile_s = {}, 0.0
    for column, function in runs.items():
      run, about = device.compiled(jax.jit(function), qkv, table)
      compile_s += about["compile s"]
      call = functools.partial(run, qkv, table)
      row[column] = 1e3 * device.seconds(call)
    ops = 4 * b * heads * n * n * width  # of the forward pass
    rate = lambda ops, ms: ops / ms / 1e9
    return {
      **row,
      "forward TFLOP/s": rate(ops, row["forward ms"]),
      "gradient TFLOP/s": rate(3.5 * ops, row["gradient ms"]),
      "compile s": compile_s,
    }
