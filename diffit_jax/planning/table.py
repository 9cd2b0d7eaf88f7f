"""A plan as a table for people."""

import textwrap


def to_table(card: dict) -> str:
  """The plan for people.

  Args:
    card: from `figures.to_json`.
  """
  lines = [
    f"{card['config']} on {card['topology']}, compiled ahead of time;"
    " nothing ran",
    "",
  ]
  rows = [*_place_rows(card), *_memory_rows(card), *_flop_rows(card)]
  if card["collectives"] is not None:
    rows += _wire_rows(card)
  if card["step_ms"] is not None:
    rows += _time_rows(card)
  width = max(len(name) for name, _ in rows)
  lines += [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
  if card["step_ms"] is not None:
    low, high = card["hbm_traffic_gb"]
    lines += [
      "",
      "Ranges: two counts of the memory traffic differ, here by"
      f" {high / low:.1f} times, and a",
      "collective uses one link of a chip or all. All is overlapped perfectly,",
      "so a real step is slower than the better end.",
    ]
  if card["missing"]:
    lines += ["", "not in this plan:"]
    for reason in card["missing"]:
      lines += textwrap.wrap(
        reason, 78, initial_indent="- ", subsequent_indent="  "
      )
  return "\n".join(lines)


def _place_rows(card: dict) -> list[tuple[str, str]]:
  slices = f" in {card['num_slices']} slices" if card["num_slices"] > 1 else ""
  mesh = " x ".join(f"{name} {size}" for name, size in card["mesh"].items())
  parts = card["num_microbatches"]
  return [
    ("chips", f"{card['chips']}{slices}, mesh {mesh}"),
    (
      "batch",
      f"{card['batch_size']}, {card['batch_per_chip']} per chip"
      + (f" in {parts} parts" if parts > 1 else "")
      + f"; remat {card['remat']}, attention {card['attention']}",
    ),
  ]


def _gib(value: float) -> str:
  return f"{value:.3f} GiB" if value >= 0.01 else f"{1024 * value:.3f} MiB"


def _memory_rows(card: dict) -> list[tuple[str, str]]:
  gib = lambda key: _gib(card[key])
  if card["fits"] is None:
    verdict = gib("total_gib")
  elif card["fits"]:
    verdict = (
      f"{gib('total_gib')} of {card['hbm_gib']:.2f}: fits,"
      f" {card['hbm_gib'] - card['total_gib']:.2f} GiB to spare"
    )
  else:
    verdict = (
      f"{gib('total_gib')} of {card['hbm_gib']:.2f}: DOES NOT FIT,"
      f" {card['over_gib']:.2f} GiB too much"
    )
  at_least = "at least " if card["fits"] is False else ""
  return [
    ("arguments per chip", gib("arguments_gib")),
    ("temporaries per chip", at_least + gib("temporaries_gib")),
    ("memory per chip", at_least + verdict),
  ]


def _flop_rows(card: dict) -> list[tuple[str, str]]:
  rows = [
    (
      "FLOPs per step",
      f"{card['flops_per_step']:.4e}, {card['flops_ratio']:.4f} of"
      f" 6 x MAC x batch = {card['formula_flops']:.4e}",
    ),
    ("recomputed", f"{100 * card['recompute_overhead']:.2f} %"),
  ]
  if card["bf16_passes"] > 1:
    rows.append(
      (
        "passes per FLOP",
        f"{card['bf16_passes']:.2f} of bfloat16 (float32 products at"
        ' precision "highest" are 6)',
      )
    )
  return rows


def _wire_rows(card: dict) -> list[tuple[str, str]]:
  rows = []
  for kind, runs in card["collectives"].items():
    if runs:
      sent = card["wire_gb_by_kind"][kind]
      rows.append((kind, f"{runs} per step, {sent:.3f} GB per chip"))
  none = [kind for kind, runs in card["collectives"].items() if not runs]
  rows += [("none of", ", ".join(none))] if none else []
  rows.append(("on the wire", f"{card['wire_gb']:.3f} GB per chip and step"))
  if card["num_slices"] > 1:
    rows.append(
      ("between slices", f"{card['dcn_gb']:.3f} GB per chip and step")
    )
  low, high = card["hbm_traffic_gb"]
  tiled = f"{card['hbm_traffic_tiled_gb']:.1f} with padding to tiles"
  traffic = f"{low:.1f} to {high:.1f} GB per chip, {tiled}"
  rows.append(("memory traffic", traffic))
  return rows


def _time_rows(card: dict) -> list[tuple[str, str]]:
  span = lambda pair, form: " to ".join(format(x, form) for x in pair)
  parts = card["roofline_ms"]
  compute = f"compute {parts['compute'][0]:.1f}"
  others = [
    f"{name} {span(parts[name], '.1f')}"
    for name in ("hbm", "wire")
    if parts[name][1]
  ]
  if parts["dcn"][1]:
    others.append(f"dcn {parts['dcn'][0]:.1f}")
  rows = [
    ("roofline, ms", ", ".join([compute, *others])),
    (
      "step",
      f"{span(card['step_ms'], '.1f')} ms, bound by"
      f" {' or '.join(dict.fromkeys(card['bound_by']))}",
    ),
    ("MFU", f"{span([100 * m for m in card['mfu']], '.0f')} %"),
  ]
  if card["epochs_per_day"]:
    rows.append(("epochs per day", span(card["epochs_per_day"], ".1f")))
  rows.append(
    (
      "chip-hours",
      f"{span(card['chip_hours'], ',.0f')} for {card['total_steps']:,} steps",
    )
  )
  return rows
