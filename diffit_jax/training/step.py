"""The training step: loss, gradient, optimizer, EMA, and what is watched."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from diffit_jax.environment import PRNG
from diffit_jax.parallel.sharding import (
  AXES,
  batch_sharding,
  replicated,
  tree_sharding,
)
from diffit_jax.run import ema as ema_lib
from diffit_jax.run.state import Monitor, TrainState

Loss = Callable[[dict, dict[str, jax.Array], jax.Array], jax.Array]


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  ema: Mapping[str, Mapping],
  *,
  batch_size: int,
  seed: int,
  matmul_precision: str = "highest",
  num_microbatches: int = 1,
  mesh: Mesh | None = None,
) -> Callable:
  """The pure step (state, monitor, batch) -> (state, monitor).

  Args:
    loss: (params, batch, step key) -> [b] losses.
    optimizer: applied to the gradient of their mean.
    ema: {name: decay rule}.
    batch_size: global.
    seed: seed of all the run's random draws.
    matmul_precision: precision of float32 products; "highest" is true float32
      on every backend, "default" the hardware's fast way.
    num_microbatches: parts of the batch that are taken one after the other, to
      save memory. Draws depend on the sample alone, so loss and gradient are
      those of the whole batch up to the order of sums.
    mesh: mesh of the batch and the parameters; None for one device.
  """
  place = (lambda tree: tree) if mesh is None else partial(_place, mesh)

  def step(state: TrainState, monitor: Monitor, batch: dict):
    key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), state.step)
    mean_loss = lambda params, batch: jnp.mean(loss(params, batch, key))
    with jax.default_matmul_precision(matmul_precision):
      value, gradients = accumulate(
        jax.value_and_grad(mean_loss),
        state.params,
        split_batch(batch, num_microbatches, mesh),
        place,
      )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    averages = {
      name: ema_lib.update(
        tree, params, ema_lib.gain(ema[name], state.step, batch_size)
      )
      for name, tree in state.ema.items()
    }
    new = TrainState(state.step + 1, params, opt_state, averages)
    return new, _watch(monitor, state.step, value, gradients)

  return step


def _place(mesh: Mesh, gradients):
  """Gradients where their parameters are."""
  return jax.lax.with_sharding_constraint(
    gradients, tree_sharding(mesh, gradients)
  )


def split_batch(batch: dict, num: int, mesh: Mesh | None = None) -> dict:
  """[b, ...] -> [num, b / num, ...]: each device parts its own rows.

  Row r of the batch goes to part r % num, so that no row changes its device.
  """

  def split(x):
    x = x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1)
    if mesh is None:
      return x
    sharding = NamedSharding(mesh, PartitionSpec(None, AXES))
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(split, batch)


def accumulate(
  value_and_grad: Callable,
  params,
  parts: dict,
  place: Callable = lambda tree: tree,
):
  """(mean loss, gradient) over the leading axis of `parts`.

  Args:
    value_and_grad: (params, part) -> (mean loss, gradient) of one part.
    params: parameters.
    parts: from `split_batch`.
    place: says where gradients lie on the devices.
  """

  def one(part):
    value, gradients = value_and_grad(params, part)
    return value, place(gradients)

  num = jax.tree.leaves(parts)[0].shape[0]
  if num == 1:
    return one(jax.tree.map(lambda x: x[0], parts))
  add = lambda sums, part: (jax.tree.map(jnp.add, sums, one(part)), None)
  zeros = jnp.float32(0), place(jax.tree.map(jnp.zeros_like, params))
  sums, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / num, sums)


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
