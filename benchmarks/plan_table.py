"""What the paper's configs need and cost on TPU slices, from compiled plans.

  python -m benchmarks.plan_table [--make=REGEX] [--out=docs/costs.md]

Compiles the train step of each config for each slice (`diffit_jax.plan`;
nothing runs on a TPU), keeps every plan in docs/plans.json, and writes all of
them as one page. A plan takes one to three minutes of CPU time for a latent
model and ten to thirty for an image model; --make limits those that are
missing to some, and the others are "not yet run". With --short, two small plans
are made anew and no page is written.
"""

import pathlib
import re

from absl import app, flags

from benchmarks import plans, report
from benchmarks.plans import Case
from diffit_jax import cli

_MAKE = flags.DEFINE_string(
  "make", "", "Missing plans to make: a part of 'CONFIG SLICE'. '^$' for none."
)
_OUT = cli.define_path("out", "The page.", "docs/costs.md")

# Per config: slices of each kind, the smallest first.
SLICES = {
  "imagenet256": (
    *("v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8"),
  ),
  "imagenet512": (
    *("v5e:8x8", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x4"),
    *("v6e:4x4", "v6e:8x8"),
  ),
  "ffhq64": ("v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
  "cifar10": ("v5e:2x4", "v5p:2x2x2", "v6e:2x4"),
}
CASES = [Case(name, place) for name, many in SLICES.items() for place in many]
# How many images fit on a chip.
LARGEST = [
  Case("imagenet256", "v5e:4x4", {"batch_size": 16 * 92}),
  Case(
    "imagenet256", "v5e:4x4", {"batch_size": 16 * 384, "model.remat": "full"}
  ),
  Case(
    "imagenet256", "v5e:4x4", {"batch_size": 16 * 512, "model.remat": "full"}
  ),
  Case("imagenet512", "v5e:4x4", {"batch_size": 16 * 16}),
]
KNOBS_OF = ("imagenet256", "v5e:4x4")
SHORT_CASES = [
  Case("imagenet256:debug", "v5e:2x4"),
  Case("digits_latent", "v6e:1x1"),
]

HEAD = """# What a run needs, and what it costs

Written by `python -m benchmarks.plan_table` from [plans.json](plans.json); do
not edit. **All figures are compile-time numbers; nothing ran on a TPU.**
[plan.md](plan.md) says what they mean. Step, days and chip-hours are from a
roofline with two counts of memory traffic, and one link of a chip or all; a
real step is slower than the better end. Days and chip-hours are for the
config's `total_steps`. "Not yet run" was not compiled; the same command goes
on with it.
"""
NOT_RUN = "not yet run"


def row(case: Case, plan: dict | None) -> dict:
  """One plan; without one, what is planned and "not yet run"."""
  config = case.resolved()
  card = plan["card"] if plan else {}
  number = lambda key: card.get(key)
  steps = card.get("total_steps")
  days = card.get("step_ms") and [
    ms * steps / 86_400_000 for ms in card["step_ms"]
  ]
  total, available = number("total_gib"), number("hbm_gib")
  fits = card.get("fits")
  return {
    "config": case.config,
    "slice": case.topology,
    "batch": config.batch_size,
    "remat": config.model.remat,
    "GiB per chip": NOT_RUN if not plan else total,
    "fits": None if not plan else "yes" if fits else "no",
    "GiB left": available - total if plan else None,
    "FLOPs / formula": number("flops_ratio"),
    "step ms": plans.span(card.get("step_ms")),
    "bound by": plans.bound_by(card) if plan else None,
    "days": plans.span(days),
    "chip-hours": plans.span(card.get("chip_hours")),
    "commit": plan["commit"] if plan else None,
  }


def cheapest(found: list[tuple[Case, dict]]) -> report.Table | None:
  """Of each config and kind of chip, the planned slice that costs least."""
  best: dict[tuple[str, str], tuple[Case, dict]] = {}
  for case, plan in found:
    kind = case.config, case.topology.partition(":")[0]
    hours = plan["card"]["chip_hours"]
    if hours and (
      kind not in best or hours < best[kind][1]["card"]["chip_hours"]
    ):
      best[kind] = case, plan
  if not best:
    return None
  rows = []
  for case, plan in best.values():
    whole = row(case, plan)
    names = ("config", "slice", "step ms", "days", "chip-hours", "GiB left")
    rows.append({name: whole[name] for name in names})
  return report.Table(
    "Fewest chip-hours of each kind, among the slices that were planned",
    rows,
    [
      "A price per chip-hour, which differs by kind, place and contract, times"
      " the chip-hours is the price of the run."
    ],
  )


def before_and_after(case: Case, before: dict, after: dict) -> dict:
  """A plan beside that of before attention was fused."""
  cards = before["card"], after["card"]
  arrow = lambda texts: " -> ".join(text or "-" for text in texts)
  digits = lambda value: f"{value:.3g}" if value else ""
  number = lambda key: arrow(digits(c.get(key)) for c in cards)
  ends = lambda key: arrow(plans.span(c.get(key)) for c in cards)
  return {
    "config": case.config,
    "slice": case.topology,
    "step ms": ends("step_ms"),
    "HBM GB": ends("hbm_traffic_gb"),
    "HBM GB with padding": number("hbm_traffic_tiled_gb"),
    "wire GB": number("wire_gb"),
    "temporaries GiB": number("temporaries_gib"),
    "FLOPs / formula": arrow(f"{c['flops_ratio']:.4g}" for c in cards),
    "commit": arrow((before["commit"], after["commit"])),
  }


def tables(kept: plans.Kept) -> list[report.Table]:
  """The page's tables, from what is there."""
  found = [(case, kept.find(case)) for case in CASES]
  made = [(case, plan) for case, plan in found if plan]
  largest = [row(case, kept.find(case)) for case in LARGEST]
  for line in largest:
    del line["days"], line["chip-hours"]  # total_steps is for another batch
    line["batch"] = f"{line['batch']:,}, {line['batch'] // 16} per chip"
  knobs = [Case(*KNOBS_OF, fields) for fields in plans.KNOBS]
  knob_rows = [
    plans.knob_row(case, plan["card"])
    for case in knobs
    if (plan := kept.find(case))
  ]
  reasons = sorted({why for _, plan in made for why in plan["card"]["missing"]})
  compared = [
    before_and_after(case, former, plan)
    for case, plan in made
    if (former := kept.find_former(case))
  ]
  result = [
    report.Table(
      "The configs as they stand",
      [row(*pair) for pair in found],
      [f"A row without a step has no {why}." for why in reasons],
    ),
    cheapest(made),
    report.Table("Before and after attention was fused", compared),
    report.Table("How many images fit on a chip", largest),
  ]
  if knob_rows:
    title = f"{' on '.join(KNOBS_OF)}: what each knob buys, one at a time"
    note = "Missing rows: `python -m benchmarks.knobs` makes them."
    notes = [note] if len(knob_rows) < len(knobs) else []
    result.append(report.Table(title, knob_rows, notes))
  return [table for table in result if table]


def make_missing(kept: plans.Kept) -> None:
  for case in [*CASES, *LARGEST]:
    if re.search(_MAKE.value, case.key):
      kept.find_or_make(case)


def main(_) -> None:
  packages = (*report.PACKAGES, "libtpu")
  if report.SHORT.value:
    rows = [row(case, plans.make(case)) for case in SHORT_CASES]
    table = report.Table("Two small plans, made now", rows)
    report.emit([table], ["Those of the paper's configs: costs.md."], packages)
    return
  kept = plans.Kept()
  make_missing(kept)
  found = tables(kept)
  page = "\n\n## ".join([HEAD.strip(), *(t.markdown() for t in found)])
  pathlib.Path(report.ROOT, _OUT.value).write_text(page + "\n")
  report.emit(found, packages=packages)


if __name__ == "__main__":
  app.run(main)
