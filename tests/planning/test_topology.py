"""Names of slices, their devices, and the mesh on them."""

import os
import sys

import jax
import pytest

from diffit_jax.errors import UserError
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.planning import topology

pytest.importorskip("libtpu")
os.environ.update(topology.LIBTPU_ENVIRONMENT)  # before libtpu is loaded


@pytest.mark.parametrize(
  "name, kind, shape, num_slices",
  [
    ("v5e:4x4", "v5e", (4, 4), 1),
    ("2xv5p:2x2x4", "v5p", (2, 2, 4), 2),
    ("cpu:8", "cpu", (8,), 1),
  ],
)
def test_names(name, kind, shape, num_slices):
  found = topology.parse(name)
  assert (found.kind, found.shape, found.num_slices) == (
    kind,
    shape,
    num_slices,
  )


@pytest.mark.parametrize(
  "name, reason",
  [
    ("v5litepod-16", "kind:AxB"),
    ("v5e-16", "kind:AxB"),
    ("v7x:4x4", "'v7x' is none of v4, v5e, v5p, v6e"),
    ("v5e:4x4x4", "2 sides"),
    ("v5p:4x4", "3 sides"),
    ("v5e:32x32", "256 chips"),
    ("v5e:0x4", "no chips"),
    ("cpu:2x2", "plain number"),
  ],
)
def test_wrong_names_say_what_is_right(name, reason):
  with pytest.raises(UserError, match=reason) as error:
    topology.parse(name)
  assert "v5e:4x4" in str(error.value)


def test_a_shape_that_libtpu_refuses():
  with pytest.raises(UserError, match="'v5e:3x3'.*not divisible.*v5e:4x4"):
    topology.devices(topology.parse("v5e:3x3"))


def test_libtpu_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(UserError, match=r"needs libtpu: pip install '.\[plan\]'"):
    topology.devices(topology.parse("v5e:4x4"))


def test_more_cpus_than_jax_has():
  assert len(topology.devices(topology.parse("cpu:4"))) == 4
  with pytest.raises(UserError, match="device_count=99"):
    topology.devices(topology.parse("cpu:99"))


@pytest.mark.parametrize(
  "name, device_kind, data, fsdp",
  [
    ("v5e:1x1", "TPU v5 lite", 1, 1),
    ("v5e:2x4", "TPU v5 lite", 1, 8),
    ("v5e:4x4", "TPU v5 lite", 1, 16),
    ("v5e:16x16", "TPU v5 lite", 16, 16),
    ("v6e:4x4", "TPU v6 lite", 1, 16),
    ("v6e:16x16", "TPU v6 lite", 16, 16),
    ("v5p:2x2x1", "TPU v5", 1, 4),
    ("v5p:4x4x4", "TPU v5", 4, 16),
    ("v4:1x1x1", "TPU v4", 1, 1),
    ("v4:2x2x4", "TPU v4", 1, 16),
    ("2xv5e:4x4", "TPU v5 lite", 2, 16),
    ("2xv5p:2x2x4", "TPU v5", 2, 16),
    ("4xv5e:16x16", "TPU v5 lite", 64, 16),
  ],
)
def test_meshes(name, device_kind, data, fsdp):
  wanted = topology.parse(name)
  devices = topology.devices(wanted)
  assert len(devices) == wanted.num_chips
  assert devices[0].device_kind == device_kind
  mesh = mesh_lib.make_mesh(data=-1, fsdp=16, devices=devices)
  assert dict(mesh.shape) == {"data": data, "fsdp": fsdp}
  if wanted.num_slices > 1:  # only `data` crosses slices, in equal runs
    per_slice = mesh.devices.reshape(wanted.num_slices, -1)
    for part in per_slice:
      assert len({device.slice_index for device in part}) == 1


@pytest.mark.parametrize("name", ["v5e:8x8", "v5p:4x8x8", "v6e:8x8"])
def test_fsdp_inside_a_side_that_it_does_not_fill(name):
  devices = topology.devices(topology.parse(name))
  mesh = mesh_lib.make_mesh(data=-1, fsdp=16, devices=devices)
  assert mesh.shape["fsdp"] == 16


def test_planning_does_not_touch_a_real_tpu():
  assert jax.default_backend() == "cpu"
