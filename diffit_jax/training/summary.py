"""What `--dry_run` prints: config, parameters, MACs, memory per device."""

import jax
from ml_collections import config_dict

from diffit_jax.models import LatentDiffiT
from diffit_jax.training import program as program_lib

_MIB = 2**20


def dry_run(
  config: config_dict.ConfigDict, devices: list[jax.Device] | None = None
) -> str:
  """The report as text. Compiles the real step; allocates no state.

  Args:
    config: the resolved config.
    devices: devices of the mesh; None is all there are.
  """
  return describe(config, program_lib.build(config, devices))


def describe(
  config: config_dict.ConfigDict, program: program_lib.Program
) -> str:
  """The same of a program that is there already."""
  params = program.abstract.params
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  memory = _memory(config, program)
  macs = program_lib.forward_macs(
    program.model, params, config.data.resolution
  )
  lines = [
    str(config),
    overview(params),
    f"parameters:          {num_params:,}"
    f"{_positions(program.model, num_params)}",
    f"MACs per image:      {macs.total:,} (one forward);"
    f" {macs.without_attention:,} without attention products",
    f"devices:             {program.mesh.size}"
    f" {jax.devices()[0].device_kind}, mesh {dict(program.mesh.shape)}",
    f"images per device:   {config.batch_size // program.mesh.size}",
    f"memory per device:   {memory['state'] / _MIB:,.1f} MiB state,"
    f" {memory['batch'] / _MIB:,.1f} MiB batch,"
    f" {memory['temporaries'] / _MIB:,.1f} MiB temporaries",
  ]
  return "\n".join(lines)


def overview(params) -> str:
  """A table of all parameters with shape, size and sharding."""
  from clu import parameter_overview  # half a second to import

  return parameter_overview.get_parameter_overview(
    params, include_stats="sharding"
  )


def _positions(model, num_params: int) -> str:
  """The latent model's position table, which others count as parameters."""
  if not isinstance(model, LatentDiffiT):
    return ""
  fixed = model.grid**2 * model.hidden_dim
  return f" + {fixed:,} fixed positions = {num_params + fixed:,}"


def _memory(config, program) -> dict[str, int]:
  """Bytes on each device while a step runs, from the compiled program."""
  arguments = program_lib.step_arguments(config, program)
  compiled = program.train_step.lower(*arguments).compile()
  state_bytes, batch_bytes = program_lib.argument_bytes(config, program)
  return {
    "state": state_bytes,
    "batch": batch_bytes,
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  }
