"""docs/gpu.md, from rows: tables, and ratios within one run of one card.

A section is one group of rows: one card, commit and date. Everything below
`section` sees the rows of one group only, so that no figure is ever divided by
one of another card or commit.
"""

from benchmarks import report
from benchmarks.on_device import peaks, rows
from benchmarks.on_device.stages import CALL_SECONDS, STAGES, of_call

HEAD = """# On an accelerator

Written by `python -m benchmarks.on_device`; do not edit. One device of the
machine is measured, even where it has more.

- **MFU** is 6 x MAC x images/s (2 x MAC in sampling and forward passes) over
  the card's bfloat16 peak by its datasheet, and over the ceiling: the fastest
  product of matrices at the same precision that the same run measured. What
  `remat` computes again does not count.
- **needs GiB** is what the compiler says that a program holds: arguments,
  results, temporaries. **peak so far GiB** is the most memory of the device
  that the stage's process held up to then, earlier rows included.
- Precisions are those of matrix products: bfloat16 operands; or float32 ones at
  "default" (TF32 on NVIDIA), "high" and "highest" (`jax.lax.Precision`).
- Nothing is compared across cards, commits or days.
"""
HOW = """\
Each adds its rows to docs/gpu.json and writes this page anew. On a machine that
keeps nothing, add `--out=DIR` and `--commit=NAME`, fetch DIR/rows.jsonl, and
add it here: `python -m benchmarks.on_device --stages= --merge=rows.jsonl`.
`--tiny` runs the same programs on a CPU, and writes no page.

JAX, Flax, Optax, Orbax, einops, safetensors and ml_collections are needed; for
`torch` a Python with PyTorch (`--torch_python`); and for `digits` all that the
project installs.

Every stage is a process of its own, which is ended when its time is over. They
run in the order of their worth, and one that finds no time left is not begun.
"""
NOT_YET = "Not yet run on any accelerator."
_HIDDEN = {"stage", "table", *rows.GROUP}
_REASONS = ("skipped", "error")
FLOPS = "model TFLOP/s"


def write(found: list[dict]) -> str:
  """The page of all rows."""
  parts = [HEAD, how_to_run()]
  parts += [section(group) for group in rows.groups(found).values()]
  if not found:
    parts.append(NOT_YET + "\n")
  return "\n".join(parts)


def how_to_run() -> str:
  """The commands, and what each stage is."""
  lines = ["## How to run it\n", "```"]
  for call, seconds in enumerate(CALL_SECONDS):
    names = ",".join(of_call(call))
    lines += [
      f"python -m benchmarks.on_device --seconds={seconds} \\",
      f"    --stages={names}",
    ]
  lines.append(f"```\n\n{HOW}")
  table = [
    {"stage": stage.name, "at most s": stage.cap, "measures": stage.what}
    for stage in STAGES.values()
  ]
  return "\n".join(lines) + "\n" + _markdown(table) + "\n"


def section(group: list[dict]) -> str:
  """All tables of one card, commit and date."""
  card, commit, date, tiny = rows.key(group[0], rows.GROUP)
  parts = [f"## {card}, commit {commit}, {date}\n"]
  if tiny:
    parts.append("Tiny sizes, to try the programs: the figures mean nothing.\n")
  for stage in STAGES.values():
    found = [row for row in group if row["stage"] == stage.name]
    if found:
      parts.append(_stage(stage, found, group))
  return "\n".join(parts)


def _stage(stage, found: list[dict], group: list[dict]) -> str:
  """One stage's tables, notes and failures; `group` for what it divides by."""
  parts = [f"### {stage.name}: {stage.what}\n"]
  figures = [row for row in found if row["case"] != rows.PROCESS]
  measured = [row for row in figures if not _reason(row)]
  tables = {}
  for row in measured:
    tables.setdefault(row.get("table", stage.name), []).append(row)
  for table in tables.values():
    table = [shown(row, group) for row in table]
    if stage.name == "machine":
      own = [(k, v) for row in table for k, v in row.items() if k != "case"]
      parts += [f"- {k}: {v}" for k, v in own]
    else:
      parts.append(_markdown(table) + "\n")
  notes = _notes(stage.name, measured, group)
  notes += [said for row in found if (said := without_figure(row))]
  return "\n".join([*parts, *(f"- {note}" for note in notes), ""])


def without_figure(row: dict) -> str | None:
  """What a row is and why it has no figure; None of one that has."""
  if not (reason := _reason(row)):
    return None
  own = {k: v for k, v in _visible(row).items() if k not in (*_REASONS, "case")}
  about = [row["case"], *(f"{k} {v}" for k, v in own.items())]
  return f"{', '.join(about)}: {reason}"


def _reason(row: dict) -> str | None:
  """Why a row has no figure."""
  found = (f"{name}: {row[name]}" for name in _REASONS if name in row)
  return next(found, None)


def _visible(row: dict) -> dict:
  return {
    k: v for k, v in row.items() if k not in _HIDDEN and v not in (None, "")
  }


def _markdown(table: list[dict]) -> str:
  """A table whose rows may lack columns, and all of whose columns are used."""
  columns = list(dict.fromkeys(k for row in table for k in row))
  used = [c for c in columns if any(r.get(c) is not None for r in table)]
  lines = [{c: row.get(c) for c in used} for row in table]
  return report.Table("", lines).markdown().strip()


def shown(row: dict, group: list[dict]) -> dict:
  """A row's columns for the page, the shares of the two peaks among them.

  Args:
    row: as it was measured.
    group: all rows of its card, commit and date.
  """
  row = _visible(row)
  flops = row.get(FLOPS) or torch_flops(row, group)
  if not flops:
    return row
  peak = peaks.peak_flops(group[0]["card"])
  ceiling = ceilings(group).get(row.get("precision"))
  mfu = {
    FLOPS: flops,
    "MFU of the datasheet": flops * 1e12 / peak if peak else None,
    "MFU of the ceiling": flops / ceiling if ceiling else None,
  }
  row.pop(FLOPS, None)
  columns = {}
  for name, value in row.items():
    columns[name] = value
    if name == "images/s":
      columns |= mfu
  return columns


def ceilings(group: list[dict]) -> dict[str, float]:
  """{precision: TFLOP/s of the fastest product} of one group."""
  found = {}
  for row in group:
    if row["stage"] == "ceilings" and "precision" in row and "TFLOP/s" in row:
      name = row["precision"]
      found[name] = max(found.get(name, 0.0), row["TFLOP/s"])
  return found


def torch_flops(row: dict, group: list[dict]) -> float | None:
  """The same count for PyTorch's steps, which are of the same network."""
  ours = _steps(group)
  if row.get("pass") != "step" or not ours:
    return None
  return row["images/s"] * ours[0][FLOPS] / ours[0]["images/s"]


def _steps(group: list[dict]) -> list[dict]:
  """Our measured steps of the network that PyTorch has, too."""
  return [r for r in group if r["stage"] == "train256" and FLOPS in r]


def _notes(stage: str, found: list[dict], group: list[dict]) -> list[str]:
  """Ratios of one stage's rows, within their group."""
  if stage == "torch":
    return _beside_torch(found, group)
  if stage == "attention":
    return [
      note
      for column in ("forward ms", "gradient ms")
      for note in _ratios(found, "attention", "xla", column, "tokens")
    ]
  if stage == "sampling":
    return _ratios(found, "guidance_tolerance", 0.0, "s", "case", "attention")
  if stage == "vae":
    return _ratios(found, "precision", "highest", "ms", "image")
  return []


def _beside_torch(found: list[dict], group: list[dict]) -> list[str]:
  """Our fastest step beside PyTorch's, at each batch that both have."""
  notes = []
  torch = [row for row in found if row.get("pass") == "step"]
  for batch in sorted({row["batch"] for row in torch}):
    of_batch = lambda table, b=batch: [r for r in table if r["batch"] == b]
    ours, its = of_batch(_steps(group)), of_batch(torch)
    if ours:
      best, other = (
        max(table, key=lambda row: row["images/s"]) for table in (ours, its)
      )
      notes.append(
        f"Batch {batch}: our fastest step (attention {best['attention']}, remat"
        f" {best['remat']}) makes"
        f" {best['images/s'] / other['images/s']:.2f} times the images/s of"
        f" PyTorch's (attention {other['attention']}, compiled"
        f" {other['compiled']})."
      )
  return notes


def _ratios(
  found: list[dict], by: str, base, column: str, *same: str
) -> list[str]:
  """Times of rows over those of the base row that is otherwise the same.

  Args:
    found: rows of one stage and group.
    by: column in which two rows differ.
    base: its value in the row that is divided by.
    column: the time.
    *same: columns in which they agree.
  """
  of = lambda row: tuple(row.get(name) for name in (*same, "batch", "steps"))
  bases = {of(r): r[column] for r in found if r.get(by) == base and column in r}
  return [
    f"{', '.join(f'{k} {row[k]}' for k in same)}: {column} with {by}={row[by]}"
    f" is {row[column] / bases[of(row)]:.3f} times that with {by}={base}."
    for row in found
    if column in row and row.get(by) not in (base, None) and of(row) in bases
  ]
