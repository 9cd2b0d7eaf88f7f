"""What a training run carries from step to step, and how it is born."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from diffit_jax.parallel import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that decides the rest of a run.

  Attributes:
    step: [] int32 steps taken; with the batch size it is the data position.
    params: float32 parameters.
    opt_state: state of the optax optimizer.
    ema: {name: tree like params}, float32.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: dict[str, Any]


@flax.struct.dataclass
class Monitor:
  """Device-side sums between two logging points; never checkpointed.

  Attributes:
    loss: [] sum of the steps' mean losses.
    grad_norm: [] sum of the gradients' global norms, as they came.
    steps: [] int32 steps in the sums.
    bad_step: [] int32 first step whose loss was not finite, -1 for none. It
      stays once set.
  """

  loss: jax.Array
  grad_norm: jax.Array
  steps: jax.Array
  bad_step: jax.Array


_NEW = Monitor(np.float32(0), np.float32(0), np.int32(0), np.int32(-1))


def abstract_monitor(mesh: Mesh) -> Monitor:
  """Shapes, dtypes and shardings of the sums."""
  whole = sharding.replicated(mesh)
  describe = lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=whole)
  return jax.tree.map(describe, _NEW)


def new_monitor(mesh: Mesh) -> Monitor:
  """Zero sums, replicated on the mesh."""
  whole = sharding.replicated(mesh)
  return jax.tree.map(lambda x: sharding.place(x, whole), _NEW)


def make_init(
  init_params, optimizer: optax.GradientTransformation, ema: Mapping
):
  """The function () -> TrainState; to be jitted with the state's shardings.

  Args:
    init_params: () -> parameter tree.
    optimizer: the run's optimizer.
    ema: names of the averages, each of which starts as the parameters.
  """

  def init() -> TrainState:
    params = init_params()
    return TrainState(
      step=jnp.int32(0),
      params=params,
      opt_state=optimizer.init(params),
      ema={name: jax.tree.map(jnp.copy, params) for name in sorted(ema)},
    )

  return init


def abstract_state(init, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, without making it."""
  shapes = jax.eval_shape(init)
  return sharding.with_sharding(shapes, sharding.tree_sharding(mesh, shapes))


def create(init, mesh: Mesh) -> TrainState:
  """Makes the state with every array born where it belongs."""
  shapes = jax.eval_shape(init)
  out = sharding.tree_sharding(mesh, shapes)
  # It runs once: at full optimisation it compiles for two to three times as
  # long, to the same bits.
  options = {"xla_backend_optimization_level": 1}
  return jax.jit(init, out_shardings=out, compiler_options=options)()


def replace_params(state: TrainState, params) -> TrainState:
  """A fresh state that starts, averages included, from given parameters.

  Args:
    state: state of step 0; its shardings are kept.
    params: tree of arrays like `state.params`.
  """
  params = jax.tree.map(
    lambda old, new: sharding.place(new, old.sharding), state.params, params
  )
  # Copies, since the train step donates each tree on its own.
  copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
  return state.replace(
    params=copy(params), ema={name: copy(params) for name in state.ema}
  )
