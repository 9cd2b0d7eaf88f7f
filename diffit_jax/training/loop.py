"""The training loop: one step after the other until done or stopped.

`open_run` finds all that can be wrong before anything of an earlier start is
touched; `restore` takes the newest state that can be read. Nothing in the loop
waits for the device except at logging points, saves and sample grids. The data
position is step x batch size, so a restored step decides which batch comes
next.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os

from absl import logging
from etils import epath
import jax
from ml_collections import config_dict

from diffit_jax import claim, environment
from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.data import pipeline
from diffit_jax.errors import UserError
from diffit_jax.interop import files
from diffit_jax.parallel import runtime, sharding
from diffit_jax.progress import Progress
from diffit_jax.run import state, storage, workdir
from diffit_jax.run.checkpoint import Checkpoints, list_steps
from diffit_jax.run.snapshots import Snapshots
from diffit_jax.stop import Stopped, StopRequest
from diffit_jax.training import (
  attention_choice,
  log,
  program,
  source,
  summary,
  timing,
  trackers,
)
from diffit_jax.training.actions import Actions, Evaluator, Now, Sampler
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
  runtime.on_process_0(lambda: trackers.check(config))
  runtime.on_all_processes(lambda: storage.check_name(directory))
  runtime.check_same("config", config.to_json_best_effort())
  directory = workdir.path_of(directory)
  built = attention_choice.build(config, devices, directory)
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
  runtime.on_process_0(lambda: attention_choice.keep(config, built, directory))
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


def restore(run: Run) -> state.TrainState:
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


def train(
  config: config_dict.ConfigDict,
  directory: str | os.PathLike,
  data_dir: str | None = None,
  make_sampler: Callable[..., Sampler | None] | None = None,
  devices: list[jax.Device] | None = None,
  vae: str | None = None,
  profile_steps: range = range(0),
  make_evaluator: Callable[..., Evaluator] | None = None,
  make_writer: Callable[..., log.Writer] = log.Writer,
  make_batches: Callable[..., Iterator] = source.make_batches,
) -> None:
  """Trains, or goes on with, the run in `directory`.

  Args:
    config: the resolved config.
    directory: the workdir; created where missing.
    data_dir: folder of the prepared data sets; None is $TFDS_DATA_DIR.
    make_sampler: (model, config, mesh, codec) -> sampler of the grids that are
      written during training, or None; None for no grids.
    devices: devices to train on; None is all there are.
    vae: diffusers folder of the VAE of a latent model, which encodes images on
      the fly and decodes sample grids.
    profile_steps: steps to trace into `<directory>/plugins/profile`, counted
      from 1.
    make_evaluator: (model, config, mesh, codec, should_stop, check_claim) ->
      Evaluator, for a score every `config.evaluate_every_steps`; None for no
      scores.
    make_writer: (workdir, config) -> writer of the metrics.
    make_batches: (data set, config, first step) -> iterator over the batches
      of this process, with a method `close`.

  Raises:
    Stopped: SIGTERM came before all steps were done, saved and scored. The
      current step is saved, and the same call goes on from it.
    UserError: something cannot be, as an option of JAX under which the run
      would draw other numbers (`environment.check`).
  """
  environment.check()
  with (
    StopRequest(runtime.preemption_notice()) as stop,
    contextlib.ExitStack() as stack,
  ):
    run = open_run(config, directory, data_dir, devices, vae, stack)
    try:
      hook_arguments = run.program.model, config, run.program.mesh, run.codec
      sampler = evaluator = None
      if make_sampler is not None and config.sample_every_steps:
        sampler = make_sampler(*hook_arguments)
        if sampler is None:
          logging.info("no sample grids: --vae was not given to decode them")
      if make_evaluator is not None and config.get("evaluate_every_steps"):
        should_stop = lambda: stop.requested
        evaluator = make_evaluator(
          *hook_arguments, should_stop, run.check_claim
        )
      writer = make_writer(run.directory, config)
      clock = timing.StepClock()
      actions = Actions(run, writer, clock, sampler, evaluator)
      patient = run.watchdog.patient
      trace = timing.StepTrace(profile_steps, run.directory, patient)
      _train(run, actions, writer, clock, trace, make_batches, stop)
    except UserError as error:
      runtime.log_error(error)  # closing waits for the other processes
      raise


def _train(run, actions, writer, clock, trace, make_batches, stop) -> None:
  """Restores, and steps until the end or a stop request; see `train`."""
  config, built, total = run.config, run.program, run.config.total_steps
  first = restore(run)
  now = Now(int(first.step), first, state.new_monitor(built.mesh))
  first_step, missing = now.step, actions.missing(now.step)
  if now.step >= total and not missing:
    logging.info("already done: step %d of %d", now.step, total)
    return
  writer.text("parameters.txt", summary.overview(built.abstract.params))
  encode = source.make_encoder(config, run.codec, built.mesh)
  batches = make_batches(run.dataset, config, now.step)
  stop.begin(now.step)
  with contextlib.ExitStack() as stack:
    for resource in (writer, batches, trace):
      stack.callback(resource.close)
    quiet = not runtime.is_process_0()
    progress = stack.enter_context(
      Progress(total, "training", "steps", now.step, quiet=quiet)
    )
    stack.enter_context(run.watchdog)
    ahead = sharding.put_ahead(built.mesh, batches)
    for action in missing:
      action.do(now)
    while now.step < total and not stop.requested:
      trace.before(now.step + 1)
      with clock.waiting("data_wait"):
        batch = next(ahead)
      now.state, now.monitor = built.train_step(
        now.state, now.monitor, encode(batch)
      )
      now.step += 1
      trace.after(now.step, now.state)
      progress.update()
      run.checkpoints.check()
      run.snapshots.check()
      if not clock.is_running:  # the first call compiled
        clock.restart(now.step)
      for action in actions.due(now.step):
        action.do(now)
      run.watchdog.step_done()
      stop.at_step(now.step)
    if stop.requested and now.step > first_step:
      logging.info("SIGTERM: saving step %d", now.step)
      with run.watchdog.patient():
        actions.save(now)
  if stop.requested and (now.step < total or actions.missing(now.step)):
    raise Stopped
