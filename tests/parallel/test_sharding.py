"""Mesh sizes, where parameters lie, and that fsdp changes no number."""

import types

import jax
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from configs import digits_latent
from diffit_jax.errors import UserError
from diffit_jax.models import latent
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.run import state
from diffit_jax.training import program as program_lib


@pytest.mark.parametrize(
  "data, fsdp, expected",
  [
    (-1, 1, (8, 1)),
    (-1, 4, (2, 4)),
    (2, -1, (2, 4)),
    (1, 8, (1, 8)),
    (-1, 16, (1, 8)),  # fewer devices: all share one copy
  ],
)
def test_mesh_sizes(data, fsdp, expected):
  mesh = mesh_lib.make_mesh(data, fsdp)
  assert mesh.devices.shape == expected and mesh.axis_names == sharding.AXES


def test_hosts_of_gpus_are_no_slices():
  """XLA gives each of them a slice_index of its own."""
  gpu = lambda i: types.SimpleNamespace(
    id=i,
    platform="gpu",
    device_kind="H100",
    process_index=i // 8,
    slice_index=i // 8,
  )
  devices = [gpu(i) for i in range(32)]
  found = mesh_lib._arrange(devices, 2, 16)
  assert found.shape == (2, 16) and list(found.ravel()) == devices


@pytest.mark.parametrize("data, fsdp", [(3, 1), (-1, 3), (-1, -1), (0, -1)])
def test_meshes_that_do_not_fit_are_refused(data, fsdp):
  with pytest.raises(UserError, match="does not make 8 devices"):
    mesh_lib.make_mesh(data, fsdp)


@pytest.mark.parametrize("batch", [0, -8, 12])
def test_batches_that_cannot_be_shared_are_refused(batch):
  message = f"batch_size={batch} cannot be divided.* use a multiple of 8$"
  with pytest.raises(UserError, match=message):
    mesh_lib.check_batch(mesh_lib.make_mesh(), batch, "batch_size")


@pytest.mark.parametrize(
  "path, shape, fsdp, expected",
  [
    ("fc1/kernel", (4, 8), 1, ()),
    ("fc1/kernel", (4, 8), 4, (None, "fsdp")),
    ("fc2/kernel", (8, 4), 4, ("fsdp",)),
    ("conv/kernel", (3, 3, 16, 8), 4, (None, None, "fsdp")),
    ("fc1/bias", (8,), 4, ()),  # small: a whole copy on every device
    ("0/mu/norm/scale", (8,), 4, ()),
    ("fc1/kernel", (3, 5), 4, ()),  # nothing divides
    ("count", (), 4, ()),
    ("mu/blocks/attn/table", (28, 961, 16), 4, (None, None, "fsdp")),
    ("blocks/odd/kernel", (28, 961), 4, ()),  # never the scan axis
    ("blocks_1/fc1/kernel", (28, 14), 4, ("fsdp",)),
  ],
)
def test_parameter_spec(path, shape, fsdp, expected):
  found = sharding.parameter_spec(path, shape, fsdp)
  assert found == PartitionSpec(*expected)


def test_the_first_rule_that_matches_decides():
  rules = (
    (r"/fc1/kernel$", PartitionSpec("fsdp", None)),
    (r"/kernel$", sharding.LARGEST),
  )
  spec = lambda path, shape: sharding.parameter_spec(path, shape, 4, rules)
  assert spec("fc1/kernel", (4, 8)) == PartitionSpec("fsdp", None)
  stacked = spec("blocks/fc1/kernel", (2, 4, 8))
  assert stacked == PartitionSpec(None, "fsdp", None)
  assert spec("fc2/kernel", (4, 8)) == PartitionSpec(None, "fsdp")
  with pytest.raises(ValueError, match="no sharding rule matches fc1/bias"):
    spec("fc1/bias", (8,))
  with pytest.raises(ValueError, match="does not fit fc1/kernel"):
    spec("fc1/kernel", (3, 8))


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
