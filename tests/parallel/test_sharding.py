"""Mesh sizes, where parameters lie, and that fsdp changes no number."""

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from configs import digits_latent
from diffit_jax.errors import UserError
from diffit_jax.models import latent
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.training import program as program_lib
from diffit_jax.training import state


@pytest.mark.parametrize(
  "data, fsdp, expected",
  [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (1, 8, (1, 8))],
)
def test_mesh_sizes(data, fsdp, expected):
  mesh = mesh_lib.make_mesh(data, fsdp)
  assert mesh.devices.shape == expected and mesh.axis_names == mesh_lib.AXES


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (-1, -1), (0, -1)])
def test_meshes_that_do_not_fit_are_refused(data, fsdp):
  with pytest.raises(UserError, match="does not make 8 devices"):
    mesh_lib.make_mesh(data, fsdp)


@pytest.mark.parametrize("batch", [0, -8, 12])
def test_batches_that_cannot_be_shared_are_refused(batch):
  with pytest.raises(UserError, match=f"batch_size={batch} cannot be divided"):
    mesh_lib.check_batch(mesh_lib.make_mesh(), batch, "batch_size")


@pytest.mark.parametrize(
  "shape, fsdp, is_stacked, expected",
  [
    ((4, 8), 1, False, ()),
    ((4, 8), 4, False, (None, "fsdp")),
    ((8, 4), 4, False, ("fsdp",)),
    ((3, 3, 16, 8), 4, False, (None, None, "fsdp")),
    ((8,), 4, False, ()),  # small: a whole copy on every device
    ((3, 5), 4, False, ()),
    ((28, 961, 16), 4, True, (None, None, "fsdp")),  # never the scan axis
    ((28, 961), 4, True, ()),
  ],
)
def test_parameter_spec(shape, fsdp, is_stacked, expected):
  found = sharding.parameter_spec(shape, fsdp, is_stacked)
  assert found == PartitionSpec(*expected)


def test_the_scanned_subtree_is_known_by_its_name():
  assert sharding.STACKED == latent.STACKED


def test_fsdp_state_is_born_sharded_with_the_same_values():
  config = digits_latent.get_config("debug")
  states = []
  for fsdp in (1, 4):
    config.mesh.fsdp = fsdp
    program = program_lib.build(config)
    states.append(state.create(program.init, program.mesh))
  kernel = states[1].params["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.shape == (2, 16, 64)
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)
  moments = [x for x in jax.tree.leaves(states[1]) if x.shape == kernel.shape]
  assert len(moments) == 4  # parameter, EMA, two moments of Adam
  assert {x.sharding.spec for x in moments} == {kernel.sharding.spec}
  jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))
