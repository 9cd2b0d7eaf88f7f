"""The least time that a step can take, from what it computes and moves.

  t = max(FLOP / peak, HBM bytes / HBM bandwidth, wire bytes / ICI bandwidth,
          bytes between slices / DCN bandwidth)

as if the four overlapped without loss, and MFU = model FLOP / (t peak) with
the formula's FLOP, 6 x MAC x batch. It is a range, since two counts of the HBM
bytes differ by a factor of 2 to 4 (`traffic`), and since a collective uses from
one link of a chip to all of them. A real step is slower than its better end.

A TPU multiplies bfloat16. A float32 product is made of several such passes: 1
at precision "default", 3 at "high", 6 at "highest" (jax.lax.Precision).
"""

from collections.abc import Iterable
import dataclasses

from diffit_jax.planning.topology import Chip
from diffit_jax.planning.traffic import Traffic
from diffit_jax.training import cost

PASSES = {"default": 1, "high": 3, "highest": 6}
Range = tuple[float, float]  # better end, worse end


def bf16_flops(products: Iterable[cost.Product]) -> int:
  """FLOPs of the bfloat16 passes that make the products."""
  return sum(
    2 * p.macs * (1 if set(p.dtypes) == {"bfloat16"} else PASSES[p.precision])
    for p in products
  )


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Milliseconds of one step on one chip, each (better end, worse end).

  Attributes:
    compute: matrix products at the peak rate.
    hbm: memory.
    wire: links to neighbours.
    dcn: network between slices.
  """

  compute: Range
  hbm: Range
  wire: Range
  dcn: Range

  @property
  def step(self) -> Range:
    """The largest of them."""
    parts = (self.compute, self.hbm, self.wire, self.dcn)
    better, worse = zip(*parts)
    return max(better), max(worse)

  @property
  def bound(self) -> tuple[str, str]:
    """What decides at each end."""
    parts = {field.name: field for field in dataclasses.fields(self)}
    largest = lambda end: max(parts, key=lambda name: getattr(self, name)[end])
    return largest(0), largest(1)


def bound(
  chip: Chip,
  flops: float,
  traffic: Traffic,
  wire_bytes: float,
  dcn_bytes: float = 0.0,
) -> Roofline:
  """The roofline of a step.

  Args:
    chip: the chip.
    flops: bfloat16 FLOPs on one chip.
    traffic: on one chip.
    wire_bytes: that one chip sends to its neighbours.
    dcn_bytes: that one chip sends to other slices.
  """
  ms = lambda amount, rate: 1e3 * amount / rate
  both = lambda time: (time, time)
  one_link = chip.ici_bandwidth / (2 * chip.ici_axes)
  return Roofline(
    compute=both(ms(flops, chip.bf16_flops)),
    hbm=(
      ms(traffic.hbm, chip.hbm_bandwidth),
      ms(traffic.touched, chip.hbm_bandwidth),
    ),
    wire=(ms(wire_bytes, chip.ici_bandwidth), ms(wire_bytes, one_link)),
    dcn=both(ms(dcn_bytes, chip.dcn_bandwidth)),
  )
