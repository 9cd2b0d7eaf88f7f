"""Plans a run on a TPU slice without having one, by compiling its train step.

  python -m diffit_jax.plan --config=configs/imagenet256.py --topology=v5e:4x4

Prints memory per chip and whether it fits, true FLOPs, collectives and bytes
on the wire, and the range that the step time must lie in. Topologies are
kind:AxB (v5e, v6e) or kind:AxBxC (v4, v5p), 2xv5e:4x4 for two slices, and cpu:8
for eight CPU devices, which need no libtpu.
"""

import json

from absl import flags

from diffit_jax import cli, config_files
from diffit_jax.errors import UserError

_CONFIG = config_files.define_flag("Config file, with variants after a colon.")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:4x4", "Chips, as v5e:4x4, v5p:2x2x4, 2xv5e:4x4 or cpu:8."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")
_SEARCH = flags.DEFINE_bool(
  "search",
  False,
  "Also find the largest batch per chip for each remat policy, and the cheapest"
  " policy that fits. Compiles some ten times.",
)


def main() -> int:
  config = config_files.required(_CONFIG)
  from diffit_jax.planning import topology as topology_lib

  topology = topology_lib.parse(_TOPOLOGY.value)
  if _SEARCH.value and topology.chip is None:
    raise UserError(
      f"--search with --topology={topology.name}: CPU devices have no memory of"
      " their own that a batch could fill; give a TPU slice"
    )
  topology_lib.prepare_environment(topology)
  from diffit_jax.planning import figures, planner, remedy, search, table

  devices = topology_lib.devices(topology)
  plan = planner.make_plan(config, topology, devices)
  trials = remedy.find(plan, devices) if plan.fits is False else []
  policies = search.search(plan, devices) if _SEARCH.value else []
  card = figures.to_json(plan)
  if _JSON.value:
    if trials:
      card["remedy"] = remedy.to_json(trials)
    if policies:
      card["search"] = search.to_json(policies)
    print(json.dumps(card, indent=2))
    return 0
  print(table.to_table(card))
  if trials:
    print("\n" + remedy.to_text(trials))
  if policies:
    print("\n" + search.to_table(policies))
  return 0


if __name__ == "__main__":
  cli.run(main)
