"""Weights in any float type, whatever the layout, and what is refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from configs import digits
from diffit_jax.errors import UserError
from diffit_jax.generation import weights
from diffit_jax.interop import files, native, official
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.parallel.mesh import make_mesh

CONFIG = digits.get_config("debug")
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float64]


def random_params(shapes):
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(3)
  return tree.unflatten(
    [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  )


PARAMS = random_params(files.parameter_shapes(CONFIG))


def write(path, params=PARAMS):
  files.write_weights(path, params, CONFIG, step=7, ema="edm")
  return path


def rewrite(path, change=lambda tensor: tensor, **header):
  """The file with other tensors, or another header; None drops a key."""
  with safetensors.safe_open(path, framework="numpy") as file:
    header = {**file.metadata(), **header}
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(
    {name: change(tensor) for name, tensor in tensors.items()},
    path,
    {key: value for key, value in header.items() if value is not None},
  )
  return path


def assert_rounded(found, params, dtype) -> None:
  """`found` is float32 and has the values that `dtype` made of `params`."""

  def check(array, original):
    assert array.dtype == np.float32
    np.testing.assert_array_equal(
      array, original.astype(dtype).astype(np.float32)
    )

  jax.tree.map(check, found, params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_native_file_of_another_type_is_read_in_float32(dtype, tmp_path):
  path = write(tmp_path / "a.safetensors")
  rewrite(path, lambda tensor: tensor.astype(dtype))
  assert_rounded(files.read_initial(path, CONFIG), PARAMS, dtype)
  mesh = make_mesh(devices=jax.devices()[:1])
  loaded = weights.from_file(path, mesh)
  assert (loaded.step, loaded.ema) == (7, "edm")
  assert_rounded(loaded.params, PARAMS, dtype)
  again = write(tmp_path / "again.safetensors", loaded.params)
  assert_rounded(native.load(again)[0], PARAMS, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_official_file_converted_as_a_whole(dtype, tmp_path):
  """With its index, which is then rounded: 960 is the last that it holds."""
  model = LatentDiffiT(
    input_size=32, hidden_dim=8, depth=1, num_heads=2, num_classes=3
  )
  path = tmp_path / "a.safetensors"
  params = random_params(official._abstract_params(model))
  official.save_official(path, model, params)
  rewrite(path, lambda tensor: tensor.astype(dtype))
  found_model, found = official.load_official(path)
  assert found_model == model
  assert_rounded(found, params, dtype)


@pytest.mark.parametrize(
  "dtype, name",
  [
    (np.int32, "I32"),
    (np.bool_, "BOOL"),
    (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
  ],
)
def test_other_types_are_refused(dtype, name, tmp_path):
  path = write(tmp_path / "a.safetensors")
  rewrite(path, lambda tensor: tensor.astype(dtype))
  num = len(jax.tree.leaves(PARAMS))
  message = f"of type {name} instead of F32 or .* and {num - 1} more"
  for read in (files.read_weights, lambda p: files.read_initial(p, CONFIG)):
    with pytest.raises(UserError, match=message):
      read(path)


def test_headers_that_other_libraries_and_older_exports_have(tmp_path):
  path = write(tmp_path / "a.safetensors")
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata()["format"] == "pt"  # all that accelerate takes
    assert file.metadata()["layout"] == "diffit_jax"
  rewrite(path, format="diffit_jax", layout=None)
  params, config, header = files.read_weights(path)
  jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
  assert json.loads(config.to_json()) == json.loads(CONFIG.to_json())
  assert header["step"] == "7"


@pytest.mark.parametrize(
  "header, message",
  [
    ({"config": "{'a': 1}"}, "config in the header of .* it is no JSON"),
    ({"config": "[1]"}, r"it is no config, but \[1\]"),
    ({"config": '{"model": {}}'}, "lacks data, diffusion, sampler, matmul"),
    ({"config": None, "ema": None}, "its header lacks config, ema, which exp"),
    ({"step": "many"}, "step='many'"),
    (
      dict.fromkeys(("format", "layout", "config", "step", "ema")),
      "its header lacks config, step, ema, .* with its metadata kept",
    ),
  ],
  ids=str,
)
def test_damaged_headers_are_one_sentence(header, message, tmp_path):
  path = rewrite(write(tmp_path / "a.safetensors"), **header)
  for read in (files.read_weights, lambda p: files.read_initial(p, CONFIG)):
    with pytest.raises(UserError, match=message) as error:
      read(path)
    assert "\n" not in str(error.value)


def test_a_cut_file_is_no_pickle_whatever_its_length_begins_with(tmp_path):
  """A header of 0x0280 bytes begins as a pickle of protocol 2 does."""
  path = tmp_path / "a.safetensors"
  header = json.dumps(
    {"a" * 545: dict(dtype="F32", shape=[], data_offsets=[0, 4])}
  )
  path.write_bytes((0x280).to_bytes(8, "little") + header.ljust(0x280).encode())
  with pytest.raises(UserError, match="not a whole safetensors file"):
    files.read_weights(path)
