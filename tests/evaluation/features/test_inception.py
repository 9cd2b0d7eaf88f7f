"""The FID Inception against known features, its file, and its extractor."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffit_jax.errors import UserError
from diffit_jax.evaluation import load_inception
from diffit_jax.evaluation.features import (
  RESIZE_RULES,
  inception,
  inception_weights,
  resize,
)
from diffit_jax.evaluation.features import extractor as extractor_lib
import inception_fill

# Of the float64 network on `golden_input`, weights of `inception_fill.fill`.
POOL = {
  0: 1.42192406,
  1: 0.552584094,
  500: 3.90788292,
  1000: 0.0449859902,
  2047: 0.0,
}
LOGITS = {0: -0.365610175, 1: 1.69355986, 1007: 1.08069416}  # with the bias
SPATIAL = [
  *(0, 1.18895428, 0.719811214, 0.173826675),
  *(0.91486902, 2.26487557, 0, 0),
]
SPATIAL_SUM, POOL_MEAN = 2106.555212, 0.727298925
DIGEST = "1eb75d93b79ba84bbdd17becd9427fbc052fb95781670dfbbdf55e8497fef4d7"


def golden_input() -> np.ndarray:
  """[1, 299, 299, 3] float64, made in PyTorch's order of axes."""
  wave = np.sin(0.05 * np.arange(3 * 299 * 299)).reshape(1, 3, 299, 299)
  return wave.transpose(0, 2, 3, 1)


def run(params, x) -> dict[str, np.ndarray]:
  apply = jax.jit(inception.Inception().apply)
  return jax.tree.map(np.asarray, apply({"params": params}, x))


def check_golden(found, fc_bias, rtol):
  pool, spatial = found["pool"][0], found["spatial"][0]
  logits = found["logits"][0] + fc_bias
  close = lambda got, want, scale: np.testing.assert_allclose(
    got, want, rtol=rtol, atol=rtol * scale
  )
  close(pool[list(POOL)], list(POOL.values()), POOL_MEAN)
  close(logits[list(LOGITS)], list(LOGITS.values()), 1)
  close(spatial[:8], SPATIAL, 1)
  close(spatial.sum(dtype=np.float64), SPATIAL_SUM, 0)
  close(pool.mean(dtype=np.float64), POOL_MEAN, 0)


@pytest.fixture(scope="module")
def state():
  return inception_fill.fill()


@pytest.fixture(scope="module")
def extractor(state):
  return load_inception(state)


@pytest.fixture(scope="module")
def file(tmp_path_factory, state):
  """The weights as PyTorch's file has them."""
  folder = tmp_path_factory.mktemp("inception")
  return pathlib.Path(inception_fill.write(folder / "i.safetensors", state))


class TestNetwork:
  def test_features_are_the_known_ones(self, extractor, state):
    found = run(extractor.params, golden_input().astype(np.float32))
    assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}
    check_golden(found, state["fc.bias"], rtol=2e-5)

  @pytest.mark.slow
  def test_features_are_the_known_ones_in_float64(self, state):
    with jax.enable_x64(True):
      params = inception_weights.fold(state, np.float64)
      found = run(params, golden_input())
    assert {a.dtype for a in found.values()} == {np.dtype(np.float64)}
    check_golden(found, state["fc.bias"], rtol=1e-8)  # 9 digits are known

  def test_parameter_counts(self):
    learned = {
      name: int(np.prod(shape))
      for name, shape in inception_weights.expected_shapes().items()
      if "running" not in name
    }
    fc = learned["fc.weight"] + learned["fc.bias"]
    assert sum(learned.values()) == 23_850_960
    assert sum(learned.values()) - fc == 21_785_568

  def test_names_and_shapes_of_the_file(self):
    shapes = inception_weights.expected_shapes()
    assert len(shapes) == 566 - 94
    assert shapes["Mixed_6d.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7b.branch3x3dbl_2.conv.weight"] == (384, 448, 3, 3)
    assert shapes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
    assert shapes["fc.weight"] == (1008, 2048)

  def test_average_leaves_the_padding_out(self):
    x = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3) ** 2
    want = np.zeros_like(x)
    for i in range(4):
      for j in range(5):
        window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        want[:, i, j] = window.mean((1, 2))
    np.testing.assert_allclose(inception.average_pool(x), want, rtol=1e-6)

  @pytest.mark.parametrize("size", [(9, 9), (8, 11)])
  @pytest.mark.parametrize(
    "kernel,stride,padding",
    [
      ((1, 1), 1, "SAME"),
      ((1, 7), 1, "SAME"),
      ((5, 5), 1, "SAME"),
      ((3, 3), 1, "VALID"),
      ((3, 3), 2, "VALID"),
    ],
  )
  def test_convolution_equals_its_sum(self, size, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3))
    w = rng.normal(size=(*kernel, 3, 4))
    border = [k // 2 if padding == "SAME" else 0 for k in kernel]
    padded = np.pad(x, [(0, 0), *((n, n) for n in border), (0, 0)])
    out = [(n - k) // stride + 1 for n, k in zip(padded.shape[1:3], kernel)]
    want = np.zeros((2, *out, 4))
    for i, j in np.ndindex(*out):
      top, left = i * stride, j * stride
      window = padded[:, top : top + kernel[0], left : left + kernel[1]]
      want[:, i, j] = np.einsum("bhwc,hwcd->bd", window, w)
    got = inception.convolve(*map(jnp.float32, (x, w)), stride, padding)
    np.testing.assert_allclose(got, want, atol=1e-5)


class TestFold:
  def test_folded_layer_is_the_normalised_one(self, state):
    name = "Conv2d_1a_3x3"
    x = np.random.default_rng(0).normal(size=(27,))
    gamma, beta, mean, var = (
      state[f"{name}.bn.{part}"]
      for part in ("weight", "bias", "running_mean", "running_var")
    )
    raw = state[f"{name}.conv.weight"].reshape(32, 27) @ x  # in (c, h, w)
    want = (raw - mean) / np.sqrt(var + 0.001) * gamma + beta
    layer = inception_weights.fold(state, np.float64)[name]
    patch = x.reshape(3, 3, 3).transpose(1, 2, 0)
    got = np.einsum("hwc,hwcd->d", patch, layer["kernel"]) + layer["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-12)

  def test_bias_of_the_classes_is_not_a_parameter(self, extractor, state):
    assert extractor.params["fc"].keys() == {"kernel"}
    np.testing.assert_array_equal(
      extractor.params["fc"]["kernel"],
      state["fc.weight"].T.astype(np.float32),
    )


class TestFile:
  def test_file_and_dict_are_the_same(self, extractor, file):
    from_file = load_inception(file)
    assert from_file.card_entry == extractor.card_entry
    # The file holds float32, the dict was folded from float64.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-7),
      from_file.params,
      extractor.params,
    )

  @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
  def test_half_precision_is_read_as_float32(self, tmp_path, state, dtype):
    """In a file and in a dict: the same values, and so the same digest."""
    half = {name: array.astype(dtype) for name, array in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    for given in (tmp_path / "half.safetensors", half):
      found = inception_weights.read_state(given)
      assert {array.dtype for array in found.values()} == {np.dtype("f4")}
      for name in ("fc.weight", "Mixed_7c.branch_pool.bn.running_var"):
        np.testing.assert_array_equal(
          found[name], half[name].astype(np.float32)
        )

  def test_about_is_json_and_changes_with_any_weight(self, state):
    about = load_inception(state, "pytorch_fid").card_entry
    assert json.loads(json.dumps(about)) == about
    assert about["resize"] == "pytorch_fid" and len(about["sha256"]) == 64
    bias = state["fc.bias"].copy()
    bias[7] += 1e-6
    changed = inception_weights.digest({**state, "fc.bias": bias})
    assert changed != about["sha256"]

  def test_digest_is_that_of_the_contents(self):
    state = {"b": np.array([1.5, -2]), "a": np.ones((1, 1), np.float16)}
    # printf 'a\0\0\0\200\077b\0\0\0\300\077\0\0\0\300' | sha256sum
    assert inception_weights.digest(state) == DIGEST

  def test_unfit_tensors_are_counted_and_named(self, state):
    kernel = "Mixed_6b.branch7x7_2.conv.weight"
    unfit = {
      **state,
      "AuxLogits.fc.weight": np.zeros((1000, 768)),
      kernel: state[kernel].swapaxes(2, 3),
    }
    for name in ("weight", "bias", "running_mean", "running_var"):
      del unfit[f"Conv2d_1a_3x3.bn.{name}"]
    with pytest.raises(UserError) as caught:
      load_inception(unfit)
    text = str(caught.value)
    assert "4 missing (Conv2d_1a_3x3.bn.weight, " in text and ", ...)" in text
    assert "1 unexpected (AuxLogits.fc.weight)" in text
    assert f"{kernel} is (128, 128, 7, 1) instead of (128, 128, 1, 7)" in text

  def test_zoo_weights_with_1000_classes_are_refused(self, state):
    zoo = {**state, "fc.weight": np.zeros((1000, 2048))}
    with pytest.raises(UserError, match=r"fc.weight is \(1000, 2048\)"):
      load_inception(zoo)

  @pytest.mark.parametrize(
    "change,message",
    [
      (lambda a: a * np.nan, "fc.bias holds values that are not finite"),
      (lambda a: a.astype(np.int32), "fc.bias is int32 instead of float32"),
    ],
  )
  def test_values_that_make_no_sense_are_refused(self, state, change, message):
    with np.errstate(invalid="ignore"):
      unfit = {**state, "fc.bias": change(state["fc.bias"])}
    with pytest.raises(UserError, match=message):
      load_inception(unfit)

  def test_negative_variance_is_refused(self, state):
    key = "Mixed_7c.branch_pool.bn.running_var"
    with pytest.raises(UserError, match=f"{key} holds negative variances"):
      load_inception({**state, key: -state[key]})

  def test_tensors_of_another_type_are_refused(self, tmp_path, state):
    tensors = {k: np.zeros(a.shape, np.float16) for k, a in state.items()}
    tensors["fc.bias"] = np.zeros(1008, np.int32)
    save_file(tensors, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match="fc.bias is of type I32"):
      load_inception(tmp_path / "whole.safetensors")

  def test_missing_file_says_where_to_get_it(self, tmp_path):
    with pytest.raises(UserError) as caught:
      load_inception(tmp_path / "none.safetensors")
    text = str(caught.value)
    for part in ("is not there", "pt_inception-2015-12-05-6726825d.pth"):
      assert part in text
    assert "save_file" in text and "--inception=" in text

  @pytest.mark.parametrize("name", ["pt_inception.pth", "a.pt", "b.pkl"])
  def test_pickle_is_refused_with_the_line_that_converts(self, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match="never loaded.*save_file") as caught:
      load_inception(path)
    target = path.with_suffix(".safetensors")
    assert str(caught.value).endswith(f"{path} {target}")

  @pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02"])
  def test_renamed_pickle_is_refused_too(self, tmp_path, start):
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(start + bytes(100))
    with pytest.raises(UserError, match="is a pickle and is never loaded"):
      load_inception(path)

  def test_partial_download_gives_one_sentence(self, tmp_path, file):
    path = tmp_path / "partial.safetensors"
    path.write_bytes(file.read_bytes())
    size = path.stat().st_size
    for left in (size - 1, size // 2, 60_000, 100, 8, 7, 0):
      os.truncate(path, left)
      with pytest.raises(UserError, match="partial download") as caught:
        load_inception(path)
      assert "\n" not in str(caught.value)

  def test_folder_is_refused(self, tmp_path):
    with pytest.raises(UserError, match="is not a whole safetensors file"):
      load_inception(tmp_path)

  def test_unknown_resize_is_refused(self, state):
    with pytest.raises(UserError, match="resize='bilinear'"):
      load_inception(state, "bilinear")


def noise(num: int, *size: int) -> np.ndarray:
  rng = np.random.default_rng(num)
  return rng.integers(0, 256, (num, *size, 3), np.uint8)


class TestExtractor:
  def test_features_of_any_number_of_images(
    self, extractor, state, monkeypatch
  ):
    monkeypatch.setattr(extractor_lib, "_CPU_BATCH_SIZE", 3)
    images = noise(5, 20, 24)
    pool, logits, spatial = extractor.features(images)
    assert pool.shape == (5, 2048) and logits.shape == (5, 1008)
    assert spatial.shape == (5, 2023)
    assert pool.dtype == logits.dtype == spatial.dtype == np.float32
    # One of the padded batch, alone.
    alone = extractor.features(images[4:])
    for got, part in zip(alone, (pool, logits, spatial)):
      np.testing.assert_allclose(got[0], part[4], rtol=1e-4, atol=1e-4)
    assert extractor._run.func._cache_size() == 1
    want = pool.astype(np.float64) @ state["fc.weight"].T  # no bias
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    assert [len(a) for a in extractor.features(images[:0])] == [0, 0, 0]

  def test_images_are_prepared_by_the_rule(self, state, monkeypatch):
    # The network stands aside: `apply` returns what it is given.
    monkeypatch.setattr(
      inception.Inception, "apply", lambda self, variables, x: {"pool": x}
    )
    images = noise(2, 10, 30)
    for rule in RESIZE_RULES:
      found = load_inception(state, rule).outputs(images)["pool"]
      want = resize.prepare(jnp.asarray(images), 299, rule)
      np.testing.assert_allclose(found, want, atol=1e-6)

  @pytest.mark.parametrize(
    "images",
    [
      np.zeros((2, 8, 8, 3), np.float32),
      np.zeros((8, 8, 3), np.uint8),
      np.zeros((2, 8, 8, 1), np.uint8),
      np.zeros((2, 3, 8, 8), np.uint8),
    ],
  )
  def test_other_images_are_refused(self, extractor, images):
    with pytest.raises(UserError, match=r"uint8 images \[n, h, w, 3\]"):
      extractor.features(images)

  def test_batch_is_split_over_a_mesh_without_collectives(self, extractor):
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    images = jax.ShapeDtypeStruct((8, 32, 32, 3), "uint8", sharding=split)
    params = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
      extractor.params,
    )
    compiled = jax.jit(extractor.apply).lower(params, images).compile()
    text = compiled.as_text()
    for word in ("all-gather", "all-reduce", "all-to-all", "permute"):
      assert f" {word}" not in text
    for sharding in compiled.output_shardings.values():
      assert sharding.is_equivalent_to(split, 2)
