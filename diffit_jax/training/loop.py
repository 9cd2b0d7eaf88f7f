"""The training loop: restore, step, log, sample, save, until done or stopped.

Nothing in the loop waits for the device except at logging points, saves and
sample grids. The data position is step x batch size, so a restored step decides
which batch comes next.
"""

from collections.abc import Callable
import contextlib
import json
import os
from typing import Protocol

from absl import logging
import jax
from ml_collections import config_dict
import numpy as np
import optax

from diffit_jax import claim, environment
from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.data import pipeline
from diffit_jax.errors import UserError
from diffit_jax.interop import files
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import runtime
from diffit_jax.progress import Progress
from diffit_jax.run import ema, state, storage, workdir
from diffit_jax.run.checkpoint import Checkpoints, list_steps
from diffit_jax.run.snapshots import Snapshots
from diffit_jax.stop import StopRequest
from diffit_jax.training import (
  attention_probe,
  metrics,
  optimizer,
  source,
  timing,
)
from diffit_jax.training import program as program_lib
from diffit_jax.training.report import overview
from diffit_jax.training.watchdog import Watchdog

# (EMA parameters of the run) -> uint8 [n, h, w, c] images for the grid.
Sampler = Callable[[dict], np.ndarray]


class Evaluator(Protocol):
  """Scores a run while it trains; see `evaluation.in_loop`."""

  def __call__(
    self, step: int, averages: dict, params: dict
  ) -> dict[str, float] | None:
    """Scores the weights of a step; None where SIGTERM came first."""

  def find(self, step: int) -> dict[str, float]:
    """What a step scored in this or an earlier start; {} for nothing."""


def train(
  config: config_dict.ConfigDict,
  directory: str | os.PathLike,
  data_dir: str | None = None,
  make_sampler: Callable[..., Sampler] | None = None,
  devices: list[jax.Device] | None = None,
  vae: str | None = None,
  profile_steps: range = range(0),
  make_evaluator: Callable[..., Evaluator] | None = None,
) -> bool:
  """Trains, or goes on with, the run in `directory`.

  Args:
    config: the resolved config.
    directory: the workdir; created where missing.
    data_dir: of the prepared data sets; None is $TFDS_DATA_DIR.
    make_sampler: (model, config, mesh, codec) -> sampler of the grids that are
      written during training, or None; None for no grids.
    devices: to train on; None is all there are.
    vae: diffusers folder of the VAE of a latent model, which encodes images on
      the fly and decodes sample grids.
    profile_steps: steps to trace into `<directory>/plugins/profile`, counted
      from 1.
    make_evaluator: (model, config, mesh, codec, should_stop, check_claim) ->
      Evaluator, for a score every `config.evaluate_every_steps`; None for no
      scores.

  Returns:
    True once total_steps are done, saved and scored; False where SIGTERM came
    first: the current step is saved, and the same call goes on from it.

  Raises:
    UserError: something cannot be, as an option of JAX under which the run
      would draw other numbers (`environment.check`).
  """
  environment.check()
  with (
    StopRequest(runtime.preemption_notice()) as stop,
    contextlib.ExitStack() as claims,
  ):
    run = _start(config, directory, data_dir, devices, vae, claims)
    try:
      run.use_hooks(make_sampler, make_evaluator, lambda: stop.requested)
      run.profile = timing.Profile(
        profile_steps, run.directory, run.watchdog.patient
      )
      return run.loop(stop)
    except UserError as error:
      runtime.tell(error)  # closing waits for the other processes
      raise
    finally:
      with run.watchdog, contextlib.closing(run.snapshots):
        run.checkpoints.close()


def _start(config, directory, data_dir, devices, vae, claims) -> "_Run":
  """Checks all that can be wrong, claims the workdir, and restores.

  `claims` is the ExitStack that gives the workdir free at the run's end.
  """
  runtime.together(lambda: storage.check_name(directory))
  runtime.check_same("config", config.to_json_best_effort())
  program = program_lib.build(config, devices)
  runtime.together(lambda: attention_probe.probe_config(config))
  directory = workdir.path_of(directory)
  codec, dataset = runtime.together(lambda: _open(config, data_dir, vae))
  identity = source.identity(dataset)
  runtime.check_same("data set", json.dumps(identity, sort_keys=True))
  runtime.check_shared(directory)
  runtime.from_first(lambda: workdir.check(directory, config, identity))
  initial = None
  is_new = runtime.from_first(lambda: not list_steps(directory))
  if config.get("init_from") and is_new:
    initial = runtime.together(
      lambda: files.read_initial(config.init_from, config)
    )
  held = claims.enter_context(
    claim.exclusive(
      directory / ".training.claim",
      "--workdir",
      directory,
      runtime.from_first,
    )
  )
  runtime.from_first(lambda: workdir.enter(directory, config, identity))
  checkpoints = Checkpoints(
    directory,
    max_to_keep=config.keep_checkpoints,
    keep_period=config.keep_every_steps,
    best_by=config.keep_best_by,
  )
  snapshots = Snapshots(directory, config)
  try:
    run = _Run(config, directory, program, checkpoints, snapshots, initial)
    run.dataset, run.codec, run.claim = dataset, codec, held
    return run
  except BaseException:
    with contextlib.closing(snapshots):
      checkpoints.close()
    raise


def _open(config, data_dir, vae):
  """(autoencoder or None, data set): what each process reads for itself."""
  codec = make_codec(config, vae)
  return codec, source.open_training_set(config, data_dir, codec)


def _grid_name(average: str) -> str:
  return f"samples_{average}"


class _Run:
  """One start of a run: the state and what is done to it between steps."""

  def __init__(
    self, config, directory, program, checkpoints, snapshots, initial
  ):
    self.config, self.program, self.directory = config, program, directory
    self.watchdog = Watchdog(config.watchdog_seconds)
    self.checkpoints, self.snapshots = checkpoints, snapshots
    self.metrics: dict[str, float] = {}  # of the last logging point
    with self.watchdog:
      restored = checkpoints.restore(program.abstract)
      if restored is None:
        restored = state.create(program.init, program.mesh)
        if initial is not None:
          restored = state.replace_params(restored, initial)
    self.state = restored
    self.step = int(restored.step)
    snapshots.save(self.step, restored.ema)  # where a kill came before it
    logging.info(
      "%s at step %d of %d, %d parameters, %d devices, in %s",
      "resuming" if self.step else "starting",
      self.step,
      config.total_steps,
      sum(leaf.size for leaf in jax.tree.leaves(restored.params)),
      program.mesh.size,
      directory,
    )
    self.monitor = state.new_monitor(program.mesh)
    self.clock = timing.StepClock()
    self.writer = metrics.Writer(directory)
    self.writer.text("parameters.txt", overview(program.abstract.params))
    self.param_norm = jax.jit(optax.tree.norm)

  def use_hooks(self, make_sampler, make_evaluator, should_stop) -> None:
    """Sets up what looks at the weights; without a decoder for it, does not."""
    program, config = self.program, self.config
    hook_arguments = program.model, config, program.mesh, self.codec
    self.encode = lambda batch: batch
    if source.is_encoding(config):
      self.encode = source.make_encoder(self.codec, program.mesh)
    self.sampler = self.evaluator = None
    if make_sampler is not None and config.sample_every_steps:
      self.sampler = make_sampler(*hook_arguments)
      if self.sampler is None:
        logging.info("no sample grids: --vae was not given to decode them")
    if make_evaluator is not None and config.get("evaluate_every_steps"):
      check = self.claim.check
      self.evaluator = make_evaluator(*hook_arguments, should_stop, check)
      for step in self.checkpoints.steps():
        self.checkpoints.note(step, self.evaluator.find(step))

  def loop(self, stop: StopRequest) -> bool:
    """Steps until the end or a stop request; saves in both cases."""
    config, total = self.config, self.config.total_steps
    if self.step >= total and not (self._lacks_grid() or self._lacks_score()):
      logging.info("already done: step %d of %d", self.step, total)
      return True
    batches = pipeline.Pipeline(
      self.dataset,
      global_batch_size=config.batch_size,
      seed=config.seed,
      start_index=self.step * config.batch_size,
      flip=config.data.flip,
      shard_index=jax.process_index(),
      num_shards=jax.process_count(),
      num_threads=config.num_threads,
    )
    first, every = self.step, self._is_due
    stop.begin(first)
    with contextlib.ExitStack() as stack:
      for resource in (self.writer, batches, self.profile):
        stack.callback(resource.close)
      progress = stack.enter_context(
        Progress(
          total, "training", "steps", first, quiet=not runtime.is_first()
        )
      )
      stack.enter_context(self.watchdog)
      ahead = mesh_lib.put_ahead(self.program.mesh, batches)
      if self._lacks_grid():  # a kill came between the save and them
        self._sample()
      if self._lacks_score():  # an earlier start was stopped over it
        self._evaluate()
      while self.step < total and not stop.requested:
        self.profile.before(self.step + 1)
        with self.clock.waiting("data_wait"):
          batch = next(ahead)
        self.state, self.monitor = self.program.train_step(
          self.state, self.monitor, self.encode(batch)
        )
        self.step += 1
        self.profile.after(self.step, self.state)
        progress.update()
        self.checkpoints.check()
        self.snapshots.check()
        if not self.clock.is_running:  # the first call compiled
          self.clock.restart(self.step)
        if every(config.log_every_steps):
          self._log()
        if every(config.save_every_steps):
          self._save()
        if self.snapshots.is_due(self.step):
          self._snapshot()
        if every(config.sample_every_steps) and self.sampler:
          self._sample()  # after saving, should it fail
        if self.evaluator and every(config.evaluate_every_steps):
          self._evaluate()
        self.watchdog.step_done()
        stop.at_step(self.step)
      if stop.requested and self.step > first:
        logging.info("SIGTERM: saving step %d", self.step)
        with self.watchdog.patient():
          self._save()
    return self.step >= total and not (stop.requested and self._lacks_score())

  def _is_due(self, every_steps: int) -> bool:
    """Whether something is to be done at this step, or at the last one."""
    is_last = self.step == self.config.total_steps
    return bool(every_steps) and (self.step % every_steps == 0 or is_last)

  def _lacks_grid(self) -> bool:
    names = [_grid_name(name) for name in self.state.ema]
    has_all = lambda: all(self.writer.has_images(self.step, n) for n in names)
    return (
      self.sampler is not None
      and self.step > 0
      and self._is_due(self.config.sample_every_steps)
      and not runtime.from_first(has_all)
    )

  def _lacks_score(self) -> bool:
    return (
      self.evaluator is not None
      and self.step > 0
      and self._is_due(self.config.evaluate_every_steps)
      and not self.evaluator.find(self.step)
    )

  def _check(self) -> None:
    """To be called before anything is written, by all processes."""
    runtime.from_first(self.claim.check)
    bad_step = int(self.monitor.bad_step)
    if bad_step >= 0:
      self._fail("the loss was not finite in", bad_step + 1)

  def _fail(self, what: str, bad_step: int) -> None:
    steps = self.checkpoints.steps()
    raise UserError(
      f"{what} step {bad_step}: nothing was saved since, and the last good"
      f" checkpoint is {steps[-1] if steps else 'none'}; look at the data,"
      " lower optimizer.learning_rate, or train in float32"
    )

  def _log(self) -> None:
    self._check()
    config, step = self.config, self.step
    monitor = jax.device_get(self.monitor)  # waits for the device
    last = np.int32(step - 1)
    scalars = {
      "loss": monitor.loss / monitor.steps,
      "grad_norm": monitor.grad_norm / monitor.steps,
      "param_norm": self.param_norm(self.state.params),
      "learning_rate": optimizer.learning_rate(
        config.optimizer, last, config.batch_size
      ),
    }
    scalars |= self.clock.scalars(step, config.batch_size)
    for name, rule in config.ema.items():
      scalars[f"ema_decay/{name}"] = ema.decay(rule, last, config.batch_size)
    self.metrics = {name: float(value) for name, value in scalars.items()}
    self.writer.scalars(step, self.metrics)
    if runtime.is_first():
      total = config.total_steps
      logging.info("%s", metrics.console_line(step, total, self.metrics))
    self.monitor = state.new_monitor(self.program.mesh)
    self.clock.restart(step)

  def _sample(self) -> None:
    self._check()
    with self.watchdog.patient():
      for name, tree in self.state.ema.items():
        self.writer.images(self.step, _grid_name(name), self.sampler(tree))
    self.clock.restart(self.step)

  def _evaluate(self) -> None:
    self._check_params()
    with self.watchdog.patient():
      found = self.evaluator(self.step, self.state.ema, self.state.params)
    if found is not None:
      self.checkpoints.note(self.step, found)
      scalars = {f"evaluation/{name}": value for name, value in found.items()}
      self.writer.scalars(self.step, scalars)
      if runtime.is_first():
        scores = ", ".join(f"{name} {x:.6g}" for name, x in found.items())
        logging.info("step %d scored: %s", self.step, scores)
    self.clock.restart(self.step)

  def _check_params(self) -> None:
    self._check()
    if not np.isfinite(self.param_norm(self.state.params)):
      self._fail("a parameter was not finite after", self.step)

  def _save(self) -> None:
    self._check_params()
    with self.clock.waiting("checkpoint"):
      self.writer.flush()
      self.snapshots.wait()
      self.checkpoints.save(
        self.step, self.state, self.config.batch_size, self.metrics
      )

  def _snapshot(self) -> None:
    self._check_params()
    with self.clock.waiting("checkpoint"):
      self.snapshots.save(self.step, self.state.ema)
