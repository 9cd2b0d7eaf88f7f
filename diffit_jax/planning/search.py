"""The largest batch per chip of every remat policy, each probe compiled."""

from collections.abc import Callable, Sequence
import dataclasses

from absl import logging

from diffit_jax.planning import aot, planner
from diffit_jax.planning.planner import Plan

_GIB = 2**30
_MAX_PROBES = 12
_MAX_GROWTH = 64  # of the batch from one probe to the next


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest batch of one remat policy.

  Attributes:
    remat: the policy.
    batch_per_chip: that fits, to within 1/8; 0 for none.
    total: bytes per chip with it.
    fits_config: whether the config's own batch fits.
    flops_ratio: FLOPs of a step over the formula's.
  """

  remat: str
  batch_per_chip: int
  total: int
  fits_config: bool
  flops_ratio: float


def search(plan: Plan, devices: Sequence) -> list[Largest]:
  """The largest batch per chip of every remat policy."""
  config, chips = plan.config, plan.topology.num_chips
  unit = config.num_microbatches
  results = []
  for remat in planner.REMATS:
    logging.info("searching the largest batch with remat %s", remat)
    known: dict[int, tuple[bool, int]] = {}

    def probe(size: int, remat=remat, known=known) -> tuple[bool, int]:
      fields = {"model.remat": remat, "batch_size": size * unit * chips}
      known[size] = planner.try_fields(plan, fields, devices)
      return known[size]

    start = max(config.batch_size // (chips * unit), 1)
    size = largest_size(probe, plan.memory.available, start)
    step = aot.trace(planner.changed(config, {"model.remat": remat}), devices)
    flops = 2 * sum(product.macs for product in step.products)
    results.append(
      Largest(
        remat=remat,
        batch_per_chip=size * unit,
        total=known[size][1] if size else 0,
        fits_config=known[start][0],
        flops_ratio=flops / plan.formula_flops,
      )
    )
  return results


def largest_size(
  probe: Callable[[int], tuple[bool, int]], limit: float, start: int
) -> int:
  """The largest size that fits, to within 1/8, with few probes.

  Memory grows about linearly with the size: a line through two probes says
  where to look next.

  Args:
    probe: size -> (fits, bytes).
    limit: bytes that fit.
    start: first size to probe.

  Returns:
    The size, 0 if not even 1 fits.
  """
  known: dict[int, int] = {}
  low, high, size = 0, None, start
  for _ in range(_MAX_PROBES):
    fits, known[size] = probe(size)
    if fits:
      low = max(low, size)
    else:
      high = size if high is None else min(high, size)
    if high is not None and _after(low) >= high:
      break
    size = _next_guess(known, limit, low, high)
  return low


def _next_guess(known, limit, low: int, high: int | None) -> int:
  if len(known) == 1:
    guess = 2 * low if low else max(high // 2, 1)
  else:
    (x0, y0), (x1, y1) = sorted(known.items())[-2:]
    each = (y1 - y0) / (x1 - x0)
    guess = x0 + (limit - y0) / each if each > 0 else 2 * x1
    guess = _round_down(min(max(int(guess), 1), _MAX_GROWTH * x1))
  guess = max(guess, _after(low))
  if high is not None and guess >= high:
    guess = max(_round_down(high - 1), low + 1)
  return guess


def _after(size: int) -> int:
  """The next size on a grid of 8 per doubling."""
  return size + max(2 ** (max(size, 1).bit_length() - 1) // 8, 1)


def _round_down(size: int) -> int:
  return size - size % max(2 ** (size.bit_length() - 1) // 8, 1)


def cheapest(results: list[Largest]) -> Largest | None:
  """The policy with the fewest FLOPs that fits the config's batch."""
  fitting = [result for result in results if result.fits_config]
  return min(fitting, key=lambda result: result.flops_ratio, default=None)


def to_json(results: list[Largest]) -> dict:
  """All policies, and the cheapest that fits the config's batch."""
  best = cheapest(results)
  return {
    "cheapest_remat": best and best.remat,
    "policies": [
      {
        "remat": result.remat,
        "batch_per_chip": result.batch_per_chip,
        "total_gib": result.total / _GIB,
        "fits_config_batch": result.fits_config,
        "flops_ratio": result.flops_ratio,
      }
      for result in results
    ],
  }


def to_table(results: list[Largest]) -> str:
  """The same for people."""
  lines = ["remat  largest batch per chip  GiB    FLOPs / formula  this batch"]
  for result in results:
    lines.append(
      f"{result.remat:<6} {result.batch_per_chip:<23}"
      f" {result.total / _GIB:<6.2f} {result.flops_ratio:<16.4f}"
      f" {'fits' if result.fits_config else 'does not fit'}"
    )
  best = cheapest(results)
  lines.append(
    f"the cheapest that fits this batch: --config.model.remat={best.remat}"
    if best
    else "no policy fits this batch"
  )
  return "\n".join([*lines, "(largest batches to within 1/8)"])
