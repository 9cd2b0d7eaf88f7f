"""Stage `attention`: the probe's verdict on fused kernels, and their times."""

import functools
import time

import jax
import jax.numpy as jnp

from benchmarks.on_device import device, rows
from diffit_jax.errors import UserError
from diffit_jax.models import attention, kernels
from diffit_jax.training import attention_probe

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
    attention_probe.probe(name, shape)
    verdict = "passes"
  except UserError as error:
    verdict = str(error)
  return {"verdict": verdict, "s": time.perf_counter() - start}


class Layer:
  """The attention of one layer, without its projections, in bfloat16."""

  def __init__(self, name: str, b: int, heads: int, side: int, width: int):
    self.shape = b, heads, side**2, width
    self.side = side
    self.attend = functools.partial(kernels.attend, kernel=name)

  def times(self) -> dict:
    """Forward, with gradients, and with the table that the bias comes from."""
    b, heads, n, width = self.shape
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    *qkv, weight = (draw(i, *self.shape).astype(jnp.bfloat16) for i in range(4))
    bias = draw(4, heads, n, n)
    table = draw(5, (2 * self.side - 1) ** 2, heads)
    loss = lambda *args: jnp.sum(
      (self.attend(*args) * weight).astype(jnp.float32)
    )
    spread = lambda table: attention.relative_position_bias(table, self.side)
    from_table = lambda q, k, v, table: loss(q, k, v, spread(table))
    runs = {
      "forward ms": (self.attend, bias),
      "gradient ms": (jax.grad(loss, (0, 1, 2, 3)), bias),
      "gradient of the table ms": (jax.grad(from_table, (0, 1, 2, 3)), table),
    }
    row, compile_s = {}, 0.0
    for column, (function, last) in runs.items():
      run, about = device.compiled(jax.jit(function), *qkv, last)
      compile_s += about["compile s"]
      call = functools.partial(run, *qkv, last)
      row[column] = 1e3 * device.seconds(call)
    ops = 4 * b * heads * n * n * width  # of the forward pass
    rate = lambda ops, ms: ops / ms / 1e9
    return {
      **row,
      "forward TFLOP/s": rate(ops, row["forward ms"]),
      "gradient TFLOP/s": rate(3.5 * ops, row["gradient ms"]),
      "compile s": compile_s,
    }
