"""What each memory and speed knob buys: plans of one config, side by side.

  python -m benchmarks.knobs [--config=imagenet256] [--topology=v5e:4x4]
      [--json=FILE]

Compiles the real train step once per row, changing one knob, as
`benchmarks.plan_table` does, and keeps the plans in the same file.
Compile-time numbers: nothing runs. With --short, a small config is compiled
anew with some knobs.
"""

from absl import app, flags

from benchmarks import plans, report

_CONFIG = flags.DEFINE_string("config", "imagenet256", "File of configs/.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Slice to plan for.")

SHORT = ("digits_latent", "v5e:2x2")
SHORT_KNOBS = ({}, {"model.remat": "full"}, {"num_microbatches": 4})


def main(_) -> None:
  name, topology = _CONFIG.value, _TOPOLOGY.value
  knobs, plan = plans.KNOBS, plans.Kept().find_or_make
  if report.SHORT.value:
    (name, topology), knobs, plan = SHORT, SHORT_KNOBS, plans.make
  cases = [plans.Case(name, topology, fields) for fields in knobs]
  cases = [case for case in cases if case.is_possible()]
  rows = [plans.knob_row(case, plan(case)["card"]) for case in cases]
  title = f"{name} on {topology}, batch {cases[0].resolved().batch_size}"
  packages = (*report.PACKAGES, "libtpu")
  report.emit([report.Table(title, rows)], packages=packages)


if __name__ == "__main__":
  app.run(main)
