"""What training does every so many steps: log, save, draw, score."""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Protocol

from absl import logging
import jax
import numpy as np
import optax

from diffit_jax.errors import UserError
from diffit_jax.parallel import runtime
from diffit_jax.run import ema, state
from diffit_jax.run.state import Monitor, TrainState
from diffit_jax.stop import Stopped
from diffit_jax.training import log, optimizer, timing

# EMA parameters -> uint8 [n, h, w, c] images of a sample grid.
Sampler = Callable[[dict], np.ndarray]


class Evaluator(Protocol):
  """Scores a run while it trains; see `evaluation.in_loop`."""

  def __call__(
    self, step: int, averages: dict, params: dict
  ) -> dict[str, float]:
    """Scores the weights of a step; raises Stopped where SIGTERM came first."""

  def find(self, step: int) -> dict[str, float]:
    """The scores of a step from this or an earlier start; {} for none."""


@dataclasses.dataclass
class Now:
  """Where a run is.

  Attributes:
    step: number of steps taken.
    state: the train state after them.
    monitor: sums since the last logging point.
  """

  step: int
  state: TrainState
  monitor: Monitor


@dataclasses.dataclass(frozen=True)
class Action:
  """Something to be done every so many steps, and at the last one.

  Attributes:
    every_steps: interval; 0 for never.
    do: does it.
    is_done: step -> whether this or an earlier start did it. A kill may come
      after a step was saved and before the rest of what is due at it; the next
      start makes up for that.
  """

  every_steps: int
  do: Callable[[Now], None]
  is_done: Callable[[int], bool] = lambda step: True

  def is_due(self, step: int, total_steps: int) -> bool:
    is_last = step == total_steps
    return bool(self.every_steps) and (step % self.every_steps == 0 or is_last)


class Actions:
  """The actions of one start of a run, in the order in which they are done.

  Attributes:
    table: the actions. A step is saved before anything that may fail.
  """

  def __init__(
    self,
    run,
    writer: log.Writer,
    clock: timing.StepClock,
    sampler: Sampler | None,
    evaluator: Evaluator | None,
  ):
    """Makes the table; does nothing yet.

    Args:
      run: `loop.Run`.
      writer: writer of the metrics.
      clock: counts what steps wait for.
      sampler: draws the grids; None for no grids.
      evaluator: scores the weights; None for no scores.
    """
    self._run, self._writer, self._clock = run, writer, clock
    self._sampler, self._evaluator = sampler, evaluator
    self._last_log: dict[str, float] = {}
    config = run.config
    self._figures = _make_figures(config)
    self.table = [
      Action(config.log_every_steps, self.log),
      Action(config.save_every_steps, self.save),
      Action(config.snapshot_every_steps, self.snapshot, run.snapshots.has),
    ]
    if sampler is not None:
      every = config.sample_every_steps
      self.table.append(Action(every, self.sample, self._has_grids))
    if evaluator is not None:
      for step in run.checkpoints.steps():
        run.checkpoints.note(step, evaluator.find(step))
      scored = lambda step: bool(evaluator.find(step))
      self.table.append(
        Action(config.evaluate_every_steps, self.evaluate, scored)
      )

  def due(self, step: int) -> list[Action]:
    total = self._run.config.total_steps
    return [action for action in self.table if action.is_due(step, total)]

  def missing(self, step: int) -> list[Action]:
    """What was due at a step that an earlier start saved, and is not done."""
    due = self.due(step) if step else []
    return [action for action in due if not action.is_done(step)]

  def log(self, now: Now) -> None:
    """Writes what the steps since the last logging point came to."""
    self._check(now)
    config, step = self._run.config, now.step
    monitor = jax.device_get(now.monitor)  # waits for the device
    scalars = {
      "loss": monitor.loss / monitor.steps,
      "grad_norm": monitor.grad_norm / monitor.steps,
      **self._figures(now),
      **self._clock.scalars(step, config.batch_size),
    }
    self._last_log = {name: float(value) for name, value in scalars.items()}
    self._writer.scalars(step, self._last_log)
    if runtime.is_process_0():
      line = log.console_line(step, config.total_steps, self._last_log)
      logging.info("%s", line)
    now.monitor = state.new_monitor(self._run.program.mesh)
    self._clock.restart(step)

  def save(self, now: Now) -> None:
    """Starts to save a checkpoint."""
    self._check_params(now)
    run = self._run
    with self._clock.waiting("checkpoint"):
      self._writer.flush()
      run.snapshots.wait()
      run.checkpoints.save(
        now.step, now.state, run.config.batch_size, self._last_log
      )

  def snapshot(self, now: Now) -> None:
    """Starts to save the averages."""
    self._check_params(now)
    with self._clock.waiting("checkpoint"):
      self._run.snapshots.save(now.step, now.state.ema)

  def sample(self, now: Now) -> None:
    """Draws a sample grid with each average."""
    self._check(now)
    with self._run.watchdog.patient():
      for name, tree in now.state.ema.items():
        images = self._sampler(tree)
        self._writer.images(now.step, _grid_name(name), images)
    self._clock.restart(now.step)

  def _has_grids(self, step: int) -> bool:
    names = map(_grid_name, self._run.config.ema)
    has_all = lambda: all(self._writer.has_images(step, n) for n in names)
    return runtime.on_process_0(has_all)

  def evaluate(self, now: Now) -> None:
    """Scores the weights, unless a request to stop comes first."""
    self._check_params(now)
    with self._run.watchdog.patient(), contextlib.suppress(Stopped):
      found = self._evaluator(now.step, now.state.ema, now.state.params)
      self._run.checkpoints.note(now.step, found)
      scalars = {f"evaluation/{name}": value for name, value in found.items()}
      self._writer.scalars(now.step, scalars)
      if runtime.is_process_0():
        scores = ", ".join(f"{name} {x:.6g}" for name, x in found.items())
        logging.info("step %d scored: %s", now.step, scores)
    self._clock.restart(now.step)

  def _check(self, now: Now) -> None:
    """Raises where nothing may be written; all processes call it together."""
    runtime.on_process_0(self._run.check_claim)
    bad_step = int(now.monitor.bad_step)
    if bad_step >= 0:
      self._fail("the loss was not finite in", bad_step + 1)

  def _check_params(self, now: Now) -> None:
    self._check(now)
    if not np.isfinite(self._figures(now)["param_norm"]):
      self._fail("a parameter was not finite after", now.step)

  def _fail(self, what: str, bad_step: int) -> None:
    steps = self._run.checkpoints.steps()
    raise UserError(
      f"{what} step {bad_step}: nothing was saved since, and the last good"
      f" checkpoint is {steps[-1] if steps else 'none'}; look at the data,"
      " lower optimizer.learning_rate, or train in float32"
    )


def _make_figures(config) -> Callable[[Now], dict[str, jax.Array]]:
  """What is logged of the parameters and the last step, in one program."""
  batch_size = config.batch_size

  @jax.jit
  def figures(params, last):
    norm = optax.tree.norm(params)
    rate = optimizer.learning_rate(config.optimizer, last, batch_size)
    decays = {
      f"ema_decay/{name}": ema.decay(rule, last, batch_size)
      for name, rule in config.ema.items()
    }
    return {"param_norm": norm, "learning_rate": rate, **decays}

  return lambda now: figures(now.state.params, np.int32(now.step - 1))


def _grid_name(average: str) -> str:
  return f"samples_{average}"
