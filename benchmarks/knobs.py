"""What each memory and speed knob buys: plans of one config, side by side.

  python -m benchmarks.knobs [--config=imagenet256] [--topology=v5e:4x4]
      [--json=FILE]

Compiles the real train step once per row, changing one knob, as
`benchmarks.plan_table` does, and keeps the plans in the same file.
Compile-time numbers: nothing runs. With --short, a small config is compiled
anew with the first knobs.
"""

from absl import app, flags

from benchmarks import plans, report

_CONFIG = flags.DEFINE_string("config", "imagenet256", "File of configs/.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Slice to plan for.")

KNOBS = (
  {},
  {"model.remat": "none"},
  {"model.remat": "full"},
  {"num_microbatches": 4},
  {"batch_size": 512},
  {"mesh.fsdp": 1},
  {"model.dtype": "float32"},
  {"model.scan_blocks": False},
)
SHORT_KNOBS = 3
SHORT = ("digits_latent", "v5e:2x2")


def row(case: plans.Case, card: dict) -> dict:
  span = lambda ends: ends and " to ".join(f"{ms:.3g}" for ms in ends)
  return {
    "knob": ", ".join(case.changes) or "as configured",
    "arguments GiB": card["arguments_gib"],
    "temporaries GiB": card["temporaries_gib"],
    "fits": "yes" if card["fits"] else "no",
    "FLOPs / formula": card["flops_ratio"],
    "wire GB": card["wire_gb"],
    "step ms": span(card["step_ms"]),
    "bound by": " or ".join(dict.fromkeys(card["bound_by"] or [])) or None,
  }


def main(_) -> None:
  name, topology = _CONFIG.value, _TOPOLOGY.value
  knobs, plan = KNOBS, plans.Kept().find_or_make
  if report.SHORT.value:
    (name, topology), knobs, plan = SHORT, KNOBS[:SHORT_KNOBS], plans.make
  cases = [plans.Case(name, topology, fields) for fields in knobs]
  cases = [case for case in cases if case.is_possible()]
  rows = [row(case, plan(case)["card"]) for case in cases]
  title = f"{name} on {topology}, batch {cases[0].resolved().batch_size}"
  packages = (*report.PACKAGES, "libtpu")
  report.emit([report.Table(title, rows)], packages=packages)


if __name__ == "__main__":
  app.run(main)
