"""The training loop: one step after the other until done or stopped.

Nothing in the loop waits for the device except at logging points, saves and
sample grids. The data position is step x batch size, so a restored step decides
which batch comes next.
"""

from collections.abc import Callable, Iterator
import contextlib
import os

from absl import logging
import jax
from ml_collections import config_dict

from diffit_jax import environment
from diffit_jax.errors import UserError
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import runtime
from diffit_jax.progress import Progress
from diffit_jax.run import state
from diffit_jax.stop import Stopped, StopRequest
from diffit_jax.training import metrics, report, source, start, timing
from diffit_jax.training.actions import Actions, Evaluator, Now, Sampler


def train(
  config: config_dict.ConfigDict,
  directory: str | os.PathLike,
  data_dir: str | None = None,
  make_sampler: Callable[..., Sampler | None] | None = None,
  devices: list[jax.Device] | None = None,
  vae: str | None = None,
  profile_steps: range = range(0),
  make_evaluator: Callable[..., Evaluator] | None = None,
  make_writer: Callable[..., metrics.Writer] = metrics.Writer,
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
    make_writer: (workdir) -> writer of the metrics.
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
    run = start.open_run(config, directory, data_dir, devices, vae, stack)
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
      writer, clock = make_writer(run.directory), timing.StepClock()
      actions = Actions(run, writer, clock, sampler, evaluator)
      trace = timing.Profile(profile_steps, run.directory, run.watchdog.patient)
      _train(run, actions, writer, clock, trace, make_batches, stop)
    except UserError as error:
      runtime.log_error(error)  # closing waits for the other processes
      raise


def _train(run, actions, writer, clock, trace, make_batches, stop) -> None:
  """Restores, and steps until the end or a stop request; see `train`."""
  config, built, total = run.config, run.program, run.config.total_steps
  first = start.restore(run)
  now = Now(int(first.step), first, state.new_monitor(built.mesh))
  first_step, missing = now.step, actions.missing(now.step)
  if now.step >= total and not missing:
    logging.info("already done: step %d of %d", now.step, total)
    return
  writer.text("parameters.txt", report.overview(built.abstract.params))
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
    ahead = mesh_lib.put_ahead(built.mesh, batches)
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
