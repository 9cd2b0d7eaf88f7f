"""The training loop: restore, step, log, sample, save, until done or stopped.

Nothing in the loop waits for the device except at logging points, saves and
sample grids. The data position is step x batch size, so a restored step decides
which batch comes next.
"""

from collections.abc import Callable
import os
import time

from absl import logging
import jax
from ml_collections import config_dict
import numpy as np
import optax

from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.data import pipeline
from diffit_jax.errors import UserError
from diffit_jax.interop import files
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.progress import Progress
from diffit_jax.stop import StopRequest
from diffit_jax.training import ema, metrics, optimizer, source, state, workdir
from diffit_jax.training import program as program_lib
from diffit_jax.training.checkpoint import Checkpoints, list_steps
from diffit_jax.training.report import overview

# (EMA parameters of the run) -> uint8 [n, h, w, c] images for the grid.
Sampler = Callable[[dict], np.ndarray]


def train(
  config: config_dict.ConfigDict,
  directory: str | os.PathLike,
  data_dir: str | None = None,
  make_sampler: Callable[..., Sampler] | None = None,
  devices: list[jax.Device] | None = None,
  vae: str | None = None,
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

  Returns:
    True once total_steps are done and saved, False where SIGTERM came first;
    then the current step is saved, and the same call goes on from it.
  """
  program = program_lib.build(config, devices)
  codec = make_codec(config, vae)
  dataset = source.open_training_set(config, data_dir, codec)
  identity = source.identity(dataset)
  workdir.check(directory, config, identity)
  initial = None
  if config.get("init_from") and not list_steps(directory):
    initial = files.read_initial(config.init_from, config)
  workdir.claim(directory, config, identity)
  checkpoints = Checkpoints(
    directory,
    max_to_keep=config.keep_checkpoints,
    keep_period=config.keep_every_steps,
  )
  with StopRequest() as stop:
    try:
      run = _Run(config, directory, program, checkpoints, initial)
      run.use_codec(codec, make_sampler)
      return run.loop(dataset, stop)
    finally:
      checkpoints.close()


class _Run:
  """One start of a run: the state and what is done to it between steps."""

  def __init__(self, config, directory, program, checkpoints, initial):
    self.config, self.program, self.checkpoints = config, program, checkpoints
    restored = checkpoints.restore(program.abstract)
    if restored is None:
      restored = state.create(program.init, program.mesh)
      if initial is not None:
        restored = state.replace_params(restored, initial)
    self.state = restored
    self.step = int(restored.step)
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
    self._clock = self._clock_step = None
    self.writer = metrics.Writer(directory)
    self.writer.text("parameters.txt", overview(program.abstract.params))
    self.param_norm = jax.jit(optax.tree.norm)

  def use_codec(self, codec, make_sampler) -> None:
    """Sets up what needs an autoencoder, or does without."""
    program, config = self.program, self.config
    self.encode = lambda batch: batch
    if source.is_encoding(config):
      self.encode = source.make_encoder(codec, program.mesh)
    self.sampler = None
    if make_sampler is not None and config.sample_every_steps:
      self.sampler = make_sampler(program.model, config, program.mesh, codec)
      if self.sampler is None:
        logging.info("no sample grids: --vae was not given to decode them")

  def loop(self, dataset, stop: StopRequest) -> bool:
    """Steps until the end or a stop request; saves in both cases."""
    config, total = self.config, self.config.total_steps
    if self.step >= total:
      logging.info("already done: step %d of %d", self.step, total)
      return True
    batches = pipeline.Pipeline(
      dataset,
      global_batch_size=config.batch_size,
      seed=config.seed,
      start_index=self.step * config.batch_size,
      flip=config.data.flip,
      shard_index=jax.process_index(),
      num_shards=jax.process_count(),
      num_threads=config.num_threads,
    )
    every = lambda n: n and (self.step % n == 0 or self.step == total)
    try:
      with Progress(total, "training", "steps", self.step) as progress:
        ahead = mesh_lib.put_ahead(self.program.mesh, batches)
        while self.step < total and not stop.requested:
          batch = next(ahead)
          self.state, self.monitor = self.program.train_step(
            self.state, self.monitor, self.encode(batch)
          )
          self.step += 1
          progress.update()
          if self._clock is None:  # the first call compiled
            self._start_clock()
          if every(config.log_every_steps):
            self._log()
          if every(config.sample_every_steps) and self.sampler:
            self._sample()
          if every(config.save_every_steps):
            self._save()
      if stop.requested:
        logging.info("SIGTERM: saving step %d", self.step)
        self._save()
    finally:
      batches.close()
      self.writer.close()
    return self.step >= total

  def _start_clock(self) -> None:
    self._clock, self._clock_step = time.monotonic(), self.step

  def _check_finite(self) -> None:
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
    self._check_finite()
    self.checkpoints.check()
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
    timed = step - self._clock_step
    if timed:
      seconds = (time.monotonic() - self._clock) / timed
      scalars["seconds_per_step"] = seconds
      scalars["images_per_second"] = config.batch_size / seconds
    for name, rule in config.ema.items():
      scalars[f"ema_decay/{name}"] = ema.decay(rule, last, config.batch_size)
    self.writer.scalars(step, {k: float(v) for k, v in scalars.items()})
    self.monitor = state.new_monitor(self.program.mesh)
    self._start_clock()

  def _sample(self) -> None:
    self._check_finite()
    for name, tree in self.state.ema.items():
      self.writer.images(self.step, f"samples_{name}", self.sampler(tree))
    self._start_clock()

  def _save(self) -> None:
    self._check_finite()
    if not np.isfinite(self.param_norm(self.state.params)):
      self._fail("a parameter was not finite after", self.step)
    self.checkpoints.save(self.step, self.state, self.config.batch_size)
