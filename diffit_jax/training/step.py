"""The training step: loss, gradient, optimizer, EMA, and what is watched."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from diffit_jax.parallel.mesh import batch_sharding, replicated
from diffit_jax.training import ema as ema_lib
from diffit_jax.training.objective import Loss
from diffit_jax.training.state import Monitor, TrainState


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  ema: Mapping[str, Mapping],
  *,
  batch_size: int,
  seed: int,
  matmul_precision: str = "highest",
) -> Callable:
  """The pure step (state, monitor, batch) -> (state, monitor).

  Args:
    loss: (params, batch, step key) -> [b] losses.
    optimizer: applied to the gradient of their mean.
    ema: {name: decay rule}.
    batch_size: global.
    seed: of all the run's random draws.
    matmul_precision: of float32 products; "highest" is true float32 on every
      backend, "default" the hardware's fast way.
  """

  def step(state: TrainState, monitor: Monitor, batch: dict):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    mean_loss = lambda params: jnp.mean(loss(params, batch, key))
    with jax.default_matmul_precision(matmul_precision):
      value, gradients = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    averages = {
      name: ema_lib.update(
        tree, params, ema_lib.decay(ema[name], state.step, batch_size)
      )
      for name, tree in state.ema.items()
    }
    new = TrainState(state.step + 1, params, opt_state, averages)
    return new, _watch(monitor, state.step, value, gradients)

  return step


def _watch(monitor: Monitor, step, loss, gradients) -> Monitor:
  is_first_bad = ~jnp.isfinite(loss) & (monitor.bad_step < 0)
  return Monitor(
    loss=monitor.loss + loss,
    grad_norm=monitor.grad_norm + optax.tree.norm(gradients),
    steps=monitor.steps + 1,
    bad_step=jnp.where(is_first_bad, step, monitor.bad_step),
  )


def compile_step(step: Callable, mesh: Mesh, abstract: TrainState) -> Callable:
  """Jits `step` over the mesh, with state and monitor donated.

  Args:
    step: from `make_step`.
    mesh: batches are split over all of it.
    abstract: the state's shapes with their shardings.
  """
  state = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  whole = replicated(mesh)
  return jax.jit(
    step,
    in_shardings=(state, whole, batch_sharding(mesh)),
    out_shardings=(state, whole),
    donate_argnums=(0, 1),
  )
