"""Everything before the first step: refuse, claim, open, restore.

All that can be wrong with a run is found here, before anything of an earlier
start is touched.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import os

from absl import logging
from etils import epath
import jax
from ml_collections import config_dict

from diffit_jax import claim
from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.data import pipeline
from diffit_jax.interop import files
from diffit_jax.parallel import runtime
from diffit_jax.run import state, storage, workdir
from diffit_jax.run.checkpoint import Checkpoints, list_steps
from diffit_jax.run.snapshots import Snapshots
from diffit_jax.run.state import TrainState
from diffit_jax.training import attention_probe, program, source
from diffit_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Run:
  """What a start of a run works with.

  Attributes:
    config: the resolved config.
    directory: the workdir, which this process holds.
    program: model, mesh and train step.
    dataset: the open data set.
    codec: autoencoder of a latent model; None without one.
    initial: parameters of `config.init_from` for a new run; else None.
    checkpoints: the workdir's checkpoints.
    snapshots: the workdir's snapshots of averages.
    watchdog: ends the process where a step hangs.
    check_claim: raises where another process took the workdir over.
  """

  config: config_dict.ConfigDict
  directory: epath.Path
  program: program.Program
  dataset: pipeline.Dataset
  codec: source.Codec | None
  initial: dict | None
  checkpoints: Checkpoints
  snapshots: Snapshots
  watchdog: Watchdog
  check_claim: Callable[[], None]


def open_run(
  config: config_dict.ConfigDict,
  directory: str | os.PathLike,
  data_dir: str | None,
  devices: list[jax.Device] | None,
  vae: str | None,
  stack: contextlib.ExitStack,
) -> Run:
  """Checks all that can be wrong, claims the workdir, and opens its folders.

  Args:
    config: the resolved config.
    directory: the workdir; created where missing.
    data_dir: folder of the prepared data sets; None is $TFDS_DATA_DIR.
    devices: devices to train on; None is all there are.
    vae: diffusers folder of the VAE; None for none.
    stack: closes the folders and frees the workdir at the end of the run.
  """
  runtime.on_all_processes(lambda: storage.check_name(directory))
  runtime.check_same("config", config.to_json_best_effort())
  built = program.build(config, devices)
  runtime.on_all_processes(lambda: attention_probe.probe_config(config))
  directory = workdir.path_of(directory)
  codec, dataset = runtime.on_all_processes(
    lambda: open_data(config, data_dir, vae)
  )
  identity = source.identity(dataset)
  runtime.check_same("data set", json.dumps(identity, sort_keys=True))
  runtime.check_shared(directory)
  runtime.on_process_0(lambda: workdir.check(directory, config, identity))
  initial = None
  is_new = runtime.on_process_0(lambda: not list_steps(directory))
  if config.get("init_from") and is_new:
    read = lambda: files.read_initial(config.init_from, config)
    initial = runtime.on_all_processes(read)
  held = claim.exclusive(
    directory / ".training.claim", "--workdir", directory, runtime.on_process_0
  )
  check_claim = stack.enter_context(held).check
  runtime.on_process_0(lambda: workdir.enter(directory, config, identity))
  checkpoints = Checkpoints(
    directory,
    max_to_keep=config.keep_checkpoints,
    keep_period=config.keep_every_steps,
    best_by=config.keep_best_by,
  )
  watchdog = Watchdog(config.watchdog_seconds)
  stack.callback(_close, watchdog, checkpoints)
  snapshots = Snapshots(directory, config)
  stack.callback(_close, watchdog, snapshots)
  return Run(
    config,
    directory,
    built,
    dataset,
    codec,
    initial,
    checkpoints,
    snapshots,
    watchdog,
    check_claim,
  )


def open_data(config, data_dir, vae):
  """(autoencoder or None, data set): what each process reads for itself."""
  codec = make_codec(config, vae)
  return codec, source.open_training_set(config, data_dir, codec)


def _close(watchdog: Watchdog, folder: Checkpoints | Snapshots) -> None:
  with watchdog:  # it may wait for a save
    folder.close()


def restore(run: Run) -> TrainState:
  """The newest state that can be read, or the first one of a new run."""
  built = run.program
  with run.watchdog:
    found = run.checkpoints.restore(built.abstract)
    if found is None:
      found = state.create(built.init, built.mesh)
      if run.initial is not None:
        found = state.replace_params(found, run.initial)
  step = int(found.step)
  logging.info(
    "%s at step %d of %d, %d parameters, %d devices, in %s",
    "resuming" if step else "starting",
    step,
    run.config.total_steps,
    sum(leaf.size for leaf in jax.tree.leaves(found.params)),
    built.mesh.size,
    run.directory,
  )
  return found
