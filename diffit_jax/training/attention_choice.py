"""Which attention kernel a run takes: what it asks for, after a probe.

`model.attention=auto` stands for the fused kernel of the devices where it
serves the network and passes the probe, and else for plain XLA. What it stood
for is kept in the workdir, so that a later start computes the same bits; on
another kind of device it is chosen anew.
"""

import json

from absl import logging
from etils import epath
from ml_collections import config_dict

from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import AUTO, PLAIN
from diffit_jax.models.kernels import probe
from diffit_jax.parallel import runtime
from diffit_jax.run import workdir
from diffit_jax.training import program

FILE = "attention.json"


def build(
  config: config_dict.ConfigDict, devices, directory: epath.Path
) -> program.Program:
  """The program with a kernel that passed the probe on these devices.

  Args:
    config: the resolved config.
    devices: devices of the mesh; None is all there are.
    directory: the workdir; it need not be there.

  Raises:
    UserError: the config asks for a kernel that fails the probe, or the run
      was begun with one that fails now.
  """
  built = program.build(config, devices)
  if config.model.get("attention", PLAIN) != AUTO:
    runtime.on_all_processes(lambda: _probe(built, config))
    return built
  kept = runtime.on_process_0(lambda: _read(directory)) or {}
  device, name = _device(built), kept.get("attention")
  is_kept = name in kernels.KERNELS and kept.get("device") == device
  if is_kept and name != built.model.attention:
    built = program.build(config, devices, name)
  elif kept and not is_kept:
    logging.info(
      "this run was begun with attention %s on %s; here it takes %s on %s",
      *(name, kept.get("device"), built.model.attention, device),
    )
  try:
    runtime.on_all_processes(lambda: _probe(built, config))
  except UserError as error:
    if is_kept:
      raise UserError(
        f"this run was begun with attention {name}, which fails here now:"
        f" {error}; --config.model.attention={PLAIN} goes on without it, to"
        " other bits"
      ) from error
    logging.warning("auto takes plain XLA: %s", error)
    built = program.build(config, devices, PLAIN)
  name, refusals = built.model.attention, _refusals(built, config)
  why = f": {'; '.join(refusals)}" if name == PLAIN and refusals else ""
  logging.info("model.attention=auto is %s on %s%s", name, device, why)
  return built


def keep(
  config: config_dict.ConfigDict, built: program.Program, directory: epath.Path
) -> None:
  """Writes down what `auto` stood for, in the workdir."""
  if config.model.get("attention", PLAIN) == AUTO:
    choice = {"attention": built.model.attention, "device": _device(built)}
    with workdir.writing(directory):
      workdir.write_whole(directory / FILE, json.dumps(choice).encode())


def _read(directory: epath.Path) -> dict:
  path = directory / FILE
  try:
    found = json.loads(path.read_text()) if path.exists() else {}
  except ValueError as error:
    logging.warning("%s is damaged (%s): passed over", path, error)
    return {}
  return found if isinstance(found, dict) else {}


def _refusals(built: program.Program, config) -> list[str]:
  """Why no fused kernel serves the run, in words."""
  device, model = built.mesh.devices.flat[0], built.model
  machine = device.platform, device.device_kind, model.dtype.name
  shapes, found = model.attention_shapes(config.data.resolution), []
  for name in kernels.KERNELS:
    try:
      kernels.check_machine(name, *machine)
      kernels.check_shapes(name, shapes, model.bias_option)
    except UserError as error:
      found.append(str(error).partition(": use ")[0])
  return found


def _device(built: program.Program) -> str:
  return built.mesh.devices.flat[0].device_kind


def _probe(built: program.Program, config: config_dict.ConfigDict) -> None:
  model = built.model
  batch_size = config.batch_size // config.num_microbatches // built.mesh.size
  shapes = model.attention_shapes(config.data.resolution)
  probe.probe_all(model.attention, shapes, batch_size, model.dtype.name)
