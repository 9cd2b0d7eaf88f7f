"""What is there is taken quietly; what is not is said in one sentence."""

import glob
import importlib.metadata
import os

import jax
import pytest

from commands import ROOT, start_python
from diffit_jax.errors import UserError
from diffit_jax.parallel import platforms

WAKE = """
import jax
from diffit_jax import cli
jax.config.update("jax_platforms", {asked!r})

def main():
  from diffit_jax.parallel.mesh import make_mesh
  mesh = make_mesh()
  maps = open("/proc/self/maps").read()
  print(mesh.size, jax.default_backend(), "libtpu" in maps)

cli.run(main)
"""


def wake(asked: str | None, **env) -> tuple[str, str]:
  process = start_python(["-c", WAKE.format(asked=asked)], ROOT, env)
  return process.communicate(timeout=120)


@pytest.mark.skipif(
  any(map(glob.glob, platforms._TPU_FILES)), reason="there is a TPU"
)
def test_libtpu_is_left_alone_where_there_is_no_tpu():
  # An interpreter anew, with the variable away, and nothing said.
  assert wake(None, JAX_PLATFORMS=None) == ("1 cpu False\n", "")


@pytest.mark.parametrize(
  "asked, reason",
  [
    ("cuda", "no such device"),  # JAX: an AssertionError without a word
    ("cpuu", "'cpuu' is not in the list of known backends"),
    ("gpu,cpu", "'rocm' is not in the list of known backends"),
  ],
)
def test_a_platform_that_is_not_there_is_one_sentence(asked, reason):
  out, err = wake(asked)
  assert not out and len(err.splitlines()) == 1, err
  assert err.startswith(f"error: JAX_PLATFORMS={asked} asks for a platform")
  assert reason in err and "and this machine has cpu: take the variable" in err


class Device(str):
  """Of the platforms that were asked for, by which it is known here."""

  device_kind = property(str)


@pytest.fixture
def machine(monkeypatch):
  """JAX without a choice, on a machine as the test makes it."""
  found = {"files": [], "plugins": [], "broken": set(), "asked": []}
  config = type("Config", (), {"jax_platforms": None})()
  config.update = lambda name, value: setattr(config, name, value)

  def devices():
    found["asked"].append(config.jax_platforms)
    if found["broken"] & set((config.jax_platforms or "").split(",")):
      raise RuntimeError("no driver (set JAX_PLATFORMS='' to ...)")
    return [Device(config.jax_platforms)]

  for name in platforms._VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax, "devices", devices)
  monkeypatch.setattr(platforms.jax, "config", config)
  monkeypatch.setattr(platforms.glob, "glob", lambda _: found["files"])
  monkeypatch.setattr(
    importlib.metadata, "entry_points", lambda group: found["plugins"]
  )
  spec = type("Spec", (), {"submodule_search_locations": []})()
  monkeypatch.setattr(platforms.importlib.util, "find_spec", lambda name: spec)
  return found


def plugin(name):
  return type("EntryPoint", (), {"name": name})()


def test_cuda_is_tried_before_the_cpu(machine, caplog):
  machine["plugins"] = [plugin("xla_cuda13")]
  assert platforms.wake() == ["cuda,cpu"] and not caplog.text
  assert platforms.wake() == ["cuda,cpu"]  # once chosen, it stays


def test_a_gpu_that_does_not_start_is_said(machine, caplog):
  machine["broken"] = {"cuda"}
  assert platforms.wake() == ["cpu"]
  assert "no GPU is used: no driver" in caplog.text


@pytest.mark.parametrize("sign", ["tpu", "plugin", "user", "name"])
def test_jax_chooses_where_it_may_be_another(machine, monkeypatch, sign):
  if sign == "tpu":
    machine["files"] = ["/dev/vfio/0"]
  if sign == "plugin":
    machine["plugins"] = [plugin("xla_rocm7")]
  if sign == "user":
    jax.config.jax_platforms = "cpu"
  if sign == "name":
    monkeypatch.setenv("JAX_PLATFORM_NAME", "cpu")
  platforms.wake()
  assert machine["asked"] == ["cpu" if sign == "user" else None]


def test_a_tpu_that_is_taken_is_no_choice_of_the_users(machine, monkeypatch):
  """On a TPU machine JAX itself asks for it."""
  machine["files"], machine["broken"] = ["/dev/accel0"], {"tpu"}
  jax.config.jax_platforms = "tpu,cpu"
  with pytest.raises(
    UserError, match="tpu,cpu asks .*no driver.*cuda,cpu: set"
  ):
    platforms.wake()
  assert "JAX_PLATFORMS" not in os.environ
