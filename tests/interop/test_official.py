"""The released layout: against numpy in float64, there and back, refusals."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from diffit_jax.errors import UserError
from diffit_jax.interop import official
from diffit_jax.models import latent
from diffit_jax.models.latent import LatentDiffiT
from goldens import hfill

GOLDEN = dict(width=16, depth=2, heads=2, grid=2, labels=6)
OTHER = dict(
  width=36,
  depth=3,
  heads=3,
  grid=3,
  labels=8,
  patch=4,
  channels=3,
  hidden=90,
  frequencies=64,
  learn_sigma=False,
)


def positions(width, grid):
  """Token by token from the definition: the column first."""
  omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
  rows = []
  for i in range(grid):
    for j in range(grid):
      parts = [f(p * omega) for p in (j, i) for f in (np.sin, np.cos)]
      rows.append(np.concatenate(parts))
  return np.array(rows)[None].astype(np.float32)


def bias_index(grid):
  """Pair by pair from the definition."""
  n = grid**2
  index = np.zeros((n, n), np.int64)
  for a in range(n):
    for b in range(n):
      row, col = a // grid - b // grid, a % grid - b % grid
      index[a, b] = (row + grid - 1) * (2 * grid - 1) + col + grid - 1
  return index


def official_tensors(
  fill,
  *,
  width,
  depth,
  heads,
  grid,
  labels,
  patch=2,
  channels=4,
  hidden=None,
  frequencies=256,
  learn_sigma=True,
):
  """A state dict as the release would save it; fill(key, shape) -> values."""
  hidden = hidden or 4 * width
  out = patch**2 * channels * (1 + learn_sigma)
  table = "relative_position_bias_table"
  linears = {
    "t_embedder.mlp.0": (width, frequencies),
    "t_embedder.mlp.2": (width, width),
    "final_layer.linear": (out, width),
  }
  shapes = {
    "x_embedder.proj.weight": (width, channels, patch, patch),
    "x_embedder.proj.bias": (width,),
    "y_embedder.embedding_table.weight": (labels, width),
  }
  for b in range(depth):
    shapes[f"blocks.{b}.attn.{table}"] = ((2 * grid - 1) ** 2, heads)
    linears[f"blocks.{b}.attn.qkv_temb"] = (3 * width, width)
    linears[f"blocks.{b}.attn.qkv"] = (3 * width, width)
    linears[f"blocks.{b}.attn.proj"] = (width, width)
    linears[f"blocks.{b}.mlp.fc1"] = (hidden, width)
    linears[f"blocks.{b}.mlp.fc2"] = (width, hidden)
  for key, (rows, columns) in linears.items():
    shapes[f"{key}.weight"] = (rows, columns)
    shapes[f"{key}.bias"] = (rows,)
  tensors = {k: np.float32(fill(k, shape)) for k, shape in shapes.items()}
  tensors["pos_embed"] = positions(width, grid)
  for b in range(depth):
    tensors[f"blocks.{b}.attn.relative_position_index"] = bias_index(grid)
  return tensors


def random_fill(seed=0):
  rng = np.random.default_rng(seed)
  return lambda key, shape: rng.normal(0, 0.3, shape)


def write(path, tensors, **changes):
  """Saves tensors; a change to None drops the key."""
  tensors = {**tensors, **changes}
  tensors = {key: value for key, value in tensors.items() if value is not None}
  safetensors.numpy.save_file(tensors, path)
  return path


@pytest.fixture
def golden(tmp_path):
  fill = lambda key, shape: hfill(key, shape, 0.2)
  tensors = official_tensors(fill, **GOLDEN)
  return tensors, write(tmp_path / "golden.safetensors", tensors)


def forward(model, params, x, t, labels):
  """Ours, on x in PyTorch's [b, c, h, w]."""
  x = jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32)
  out = jax.jit(model.apply)(
    {"params": params}, x, jnp.asarray(t), jnp.asarray(labels)
  )
  return np.moveaxis(np.asarray(out), -1, 1)


def test_golden_file(golden):
  _, path = golden
  model, params = official.load_official(path)
  x = np.sin(0.3 * np.arange(128) + 1).reshape(2, 4, 4, 4)
  out = forward(model, params, x, [10, 600], [1, 3])
  expected = [
      -0.1784457, -0.31802024, 0.26043664, -0.23467128,
      -0.079164013, 0.68998268, 0.25648981, 0.22512315,
  ]  # fmt: skip
  np.testing.assert_allclose(out[0, :, 0, 0], expected, atol=2e-6)
  np.testing.assert_allclose(out.sum(), 25.993026, atol=2e-5)
  np.testing.assert_allclose(np.abs(out).sum(), 67.655608, atol=2e-5)


def reference_forward(tensors, x, t, label, heads, learn_sigma):
  """One sample [c, h, w] in float64, from the equations on official tensors."""
  w = {key: np.asarray(value, np.float64) for key, value in tensors.items()}
  linear = lambda key, v: v @ w[f"{key}.weight"].T + w[f"{key}.bias"]
  silu = lambda v: v / (1 + np.exp(-v))

  def norm(v):
    centred = v - v.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

  conv = w["x_embedder.proj.weight"]
  width, channels, patch, _ = conv.shape
  grid = x.shape[1] // patch
  tokens = np.zeros((grid**2, width))
  for n in range(grid**2):
    i, j = n // grid * patch, n % grid * patch
    square = x[:, i : i + patch, j : j + patch]
    tokens[n] = np.tensordot(conv, square, 3) + w["x_embedder.proj.bias"]
  tokens += w["pos_embed"][0]

  half = w["t_embedder.mlp.0.weight"].shape[1] // 2
  angles = t * np.exp(-np.log(10000) * np.arange(half) / half)
  c = linear("t_embedder.mlp.0", np.r_[np.cos(angles), np.sin(angles)])
  c = linear("t_embedder.mlp.2", silu(c))
  c = c + w["y_embedder.embedding_table.weight"][label]

  depth = sum(key.endswith("attn.qkv.weight") for key in w)
  for b in range(depth):
    attn, mlp = f"blocks.{b}.attn", f"blocks.{b}.mlp"
    qkv = linear(f"{attn}.qkv", norm(tokens)) + linear(f"{attn}.qkv_temb", c)
    q, k, v = qkv.reshape(-1, 3, heads, width // heads).transpose(1, 2, 0, 3)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(width // heads)
    index = tensors[f"{attn}.relative_position_index"]
    table = w[f"{attn}.relative_position_bias_table"]
    logits = logits + table[index].transpose(2, 0, 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    merged = (weights @ v).transpose(1, 0, 2).reshape(-1, width)
    tokens = tokens + linear(f"{attn}.proj", merged)
    h = linear(f"{mlp}.fc1", norm(tokens))
    h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    tokens = tokens + linear(f"{mlp}.fc2", h)

  values = linear("final_layer.linear", silu(norm(tokens)))
  out_channels = channels * (1 + learn_sigma)
  out = np.zeros((out_channels, *x.shape[1:]))
  for n in range(grid**2):
    i, j = n // grid * patch, n % grid * patch
    square = values[n].reshape(patch, patch, out_channels)
    out[:, i : i + patch, j : j + patch] = np.moveaxis(square, -1, 0)
  return out


@pytest.mark.parametrize("sizes", [GOLDEN, OTHER])
def test_forward_equals_float64_numpy(tmp_path, sizes):
  tensors = official_tensors(random_fill(), **sizes)
  model, params = official.load_official(
    write(tmp_path / "random.safetensors", tensors)
  )
  rng = np.random.default_rng(1)
  side = model.input_size
  x = rng.normal(size=(4, model.channels, side, side)).astype(np.float32)
  t, labels = np.array([0, 251, 640, 999]), [0, 3, 1, sizes["labels"] - 1]
  out = forward(model, params, x, t, labels)
  for n in range(4):
    expected = reference_forward(
      tensors,
      x[n].astype(np.float64),
      t[n],
      labels[n],
      sizes["heads"],
      sizes.get("learn_sigma", True),
    )
    error = np.linalg.norm(out[n] - expected) / np.linalg.norm(expected)
    assert error < 2e-6, (n, error)  # float32 keeps 6e-8, some 20 roundings


def test_every_size_is_read_from_the_tensors(tmp_path):
  tensors = official_tensors(random_fill(), **OTHER)
  path = write(tmp_path / "other.safetensors", tensors)
  model, params = official.load_official(path)
  assert model == LatentDiffiT(
    input_size=12,
    patch_size=4,
    channels=3,
    hidden_dim=36,
    depth=3,
    num_heads=3,
    mlp_ratio=2.5,
    num_classes=7,
    learn_sigma=False,
    frequency_dim=64,
  )
  assert params["blocks"]["attn"]["qkv"]["kernel"].shape == (3, 36, 108)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  model, _ = official.load_official(path, null_label=False)
  assert (model.num_classes, model.null_label) == (8, False)


@pytest.mark.parametrize("sizes", [GOLDEN, OTHER])
@pytest.mark.parametrize("unrolled", [False, True])
def test_round_trip_is_bit_identical(tmp_path, sizes, unrolled):
  """Tensor for tensor, and the bytes that the safetensors library writes."""
  tensors = official_tensors(random_fill(), **sizes)
  path = write(tmp_path / "in.safetensors", tensors)
  model, params = official.load_official(path)
  if unrolled:
    params = latent.unstack_blocks(params)
    params = jax.tree.map(jnp.asarray, params)
  out = tmp_path / "new" / "out.safetensors"
  official.save_official(out, model, params)
  with safetensors.safe_open(out, framework="numpy") as file:
    assert file.metadata() == {"format": "pt"}
  back = safetensors.numpy.load_file(out)
  assert back.keys() == tensors.keys()
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype
    assert back[key].shape == tensor.shape
    assert back[key].tobytes() == tensor.tobytes(), key
  library = safetensors.numpy.save(tensors, {"format": "pt"})
  assert out.read_bytes() == library
  assert [f.name for f in out.parent.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
  "side, tokens, offsets", [(32, 256, 961), (64, 1024, 3969)]
)
def test_released_keys_and_shapes(side, tokens, offsets):
  """The released keys of GOLDENS.md: 8 + 12 * 28 + 2 keys."""
  expected = official_tensors(
    lambda key, shape: 0,
    width=16,
    depth=28,
    heads=16,
    grid=2,
    labels=1001,
  ).keys()
  shapes = official.official_shapes(LatentDiffiT(input_size=side))
  assert len(shapes) == 346 and shapes.keys() == expected
  assert shapes["pos_embed"] == (1, tokens, 1152)
  assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
  assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
  assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
  block = "blocks.27."
  table = f"{block}attn.relative_position_bias_table"
  assert shapes[table] == (offsets, 16)
  index = f"{block}attn.relative_position_index"
  assert shapes[index] == (tokens, tokens)
  assert shapes[f"{block}attn.qkv_temb.weight"] == (3456, 1152)
  assert shapes[f"{block}attn.proj.weight"] == (1152, 1152)
  assert shapes[f"{block}mlp.fc1.weight"] == (4608, 1152)
  assert shapes[f"{block}mlp.fc2.weight"] == (1152, 4608)
  assert shapes["final_layer.linear.weight"] == (32, 1152)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_the_same_float32_values(tmp_path, dtype):
  tensors = official_tensors(random_fill(), **GOLDEN)
  half = {
    key: value.astype(dtype) if value.dtype == np.float32 else value
    for key, value in tensors.items()
  }
  path = tmp_path / "half.safetensors"
  safetensors.numpy.save_file(half, path)
  _, params = official.load_official(path)
  kernel = params["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.dtype == np.float32
  expected = half["blocks.1.mlp.fc1.weight"].astype(np.float32).T
  np.testing.assert_array_equal(kernel[1], expected)


def test_one_error_lists_everything_that_is_wrong(tmp_path, golden):
  tensors, _ = golden
  bad = tensors["blocks.1.mlp.fc2.weight"].T.copy()
  path = write(
    tmp_path / "bad.safetensors",
    tensors,
    **{
      "blocks.0.attn.qkv.bias": None,
      "final_layer.linear.weight": None,
      "blocks.0.adaLN_modulation.1.bias": np.zeros(3, np.float32),
      "blocks.1.mlp.fc2.weight": bad,
      "x_embedder.proj.bias": np.zeros(16, np.int16),
    },
  )
  with pytest.raises(UserError) as error:
    official.load_official(path)
  text = str(error.value)
  assert "missing: final_layer.linear.weight, blocks.0.attn.qkv.bias;" in text
  assert "unknown: blocks.0.adaLN_modulation.1.bias;" in text
  assert "blocks.1.mlp.fc2.weight (64, 16) instead of (16, 64)" in text
  assert "x_embedder.proj.bias is of type I16 instead of F32 or F16" in text
  assert "\n" not in text


def test_long_lists_are_cut(tmp_path):
  other = {f"layer.{i}": np.zeros(1, np.float32) for i in range(300)}
  path = write(tmp_path / "other.safetensors", other)
  with pytest.raises(UserError, match="pos_embed.* and 12 more; unkn") as error:
    official.load_official(path)
  assert " and 290 more" in str(error.value) and len(str(error.value)) < 1200


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"pos_embed": np.zeros((1, 4, 16), np.float32)},
      "pos_embed is not the fixed sin-cos table",
    ),
    (
      {"pos_embed": np.full((1, 4, 16), np.nan, np.float32)},
      "pos_embed is not the fixed sin-cos table",
    ),
    (
      {"pos_embed": np.zeros((1, 5, 16), np.float32)},
      r"pos_embed \(1, 5, 16\) instead of \(1, 4, 16\)",
    ),
    (
      {"pos_embed": np.zeros((2, 4, 16), np.float32)},
      r"pos_embed \(2, 4, 16\) instead of \(1, 4, 16\)",
    ),
    (
      {"blocks.1.attn.relative_position_index": bias_index(2).T.copy()},
      "blocks.1.attn.relative_position_index is not",
    ),
    (
      {"blocks.1.attn.relative_position_index": bias_index(2).astype(np.int32)},
      "I32 instead of I64",
    ),
    (
      {
        "final_layer.linear.weight": np.zeros((24, 16), np.float32),
        "final_layer.linear.bias": np.zeros(24, np.float32),
      },
      "24 outputs per token, not 16, or 32 with variances",
    ),
    (
      {
        f"blocks.{b}.attn.relative_position_bias_table": np.zeros(
          (9, 3), np.float32
        )
        for b in range(2)
      },
      "width 16 is not a multiple of 4 and of 3 heads",
    ),
    (
      {
        f"blocks.{b}.attn.relative_position_bias_table": np.zeros(
          (25, 2), np.float32
        )
        for b in range(2)
      },
      "bias tables have 25 rows, not the 9 of 2x2 tokens",
    ),
    (
      {
        f"blocks.{b}.attn.relative_position_bias_table": np.zeros(
          (9, 0), np.float32
        )
        for b in range(2)
      },
      "sizes: zero in",
    ),
    (
      {"blocks.3.attn.qkv.bias": np.zeros(48, np.float32)},
      r"missing: blocks\.2\..* and 13 more",
    ),
  ],
)
def test_wrong_tensors_are_refused(tmp_path, golden, changes, message):
  path = write(tmp_path / "bad.safetensors", golden[0], **changes)
  with pytest.raises(UserError, match=message):
    official.load_official(path)


def test_positions_within_rounding_are_accepted(tmp_path, golden):
  tensors, _ = golden
  rounded = tensors["pos_embed"] + np.float32(1e-6)
  path = write(tmp_path / "near.safetensors", tensors, pos_embed=rounded)
  official.load_official(path)


def test_files_that_are_not_safetensors_are_refused(tmp_path, golden):
  whole = golden[1].read_bytes()
  not_whole = "is not a whole safetensors file"
  cases = {
    "cut.safetensors": (whole[:-1000], not_whole),
    "header.safetensors": (whole[:100], not_whole),
    "empty.safetensors": (b"", not_whole),
    "text.safetensors": (b"hello " * 50, not_whole),
    "zip.safetensors": (b"PK\x03\x04" + bytes(9), "pickle.*weights_only"),
    "old.safetensors": (b"\x80\x02\x8a\nl\xfc\x9c" * 9, "is a pickle"),
    "weights.pth": (b"anything at all", r"save_file.*weights\.safetensors"),
  }
  for name, (content, message) in cases.items():
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
      official.load_official(path)
  for path in (tmp_path, tmp_path / "absent.safetensors"):
    with pytest.raises(UserError, match="is not a file"):
      official.load_official(path)


def test_failed_writes_leave_the_old_file(tmp_path, golden, monkeypatch):
  model, params = official.load_official(golden[1])
  out = tmp_path / "out.safetensors"
  out.write_bytes(b"old")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(UserError, match="writing .*disk full"):
    official.save_official(out, model, params)
  assert out.read_bytes() == b"old"
  assert not list(tmp_path.glob("*.partial"))


def test_parameters_of_another_model_are_not_written(tmp_path, golden):
  model, params = official.load_official(golden[1])
  out = tmp_path / "out.safetensors"
  with pytest.raises(UserError, match="label_embed/embedding is .6, 16. inst"):
    official.save_official(out, model.clone(num_classes=9), params)
  with pytest.raises(UserError, match="must end in .safetensors"):
    official.save_official(tmp_path / "out.pth", model, params)
  assert not out.exists()


MEMORY = """
import pathlib, sys, threading, time
from diffit_jax.interop import official

def anonymous():
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("RssAnon:")[1].split()[0]) * 1024

def peak_of(function):
  peak, done = [anonymous()], threading.Event()
  def watch():
    while not done.is_set():
      peak.append(anonymous())
      time.sleep(0.001)
  thread = threading.Thread(target=watch)
  thread.start()
  result = function()
  done.set()
  thread.join()
  return max(peak), result

small, large, out = sys.argv[1:]
official.save_official(out, *official.load_official(small))  # start-up
start = anonymous()
seconds = -time.monotonic()
peak, loaded = peak_of(lambda: official.load_official(large))
seconds += time.monotonic()
written, _ = peak_of(lambda: official.save_official(out, *loaded))
print(peak - start, written - start, seconds)
"""


def measure_memory(small, large, out):
  done = subprocess.run(
    [sys.executable, "-c", MEMORY, small, large, out],
    capture_output=True,
    text=True,
    check=True,
  )
  return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(
  not os.path.exists("/proc/self/status"), reason="reads Linux's RssAnon"
)
def test_memory_stays_near_the_size_of_the_file(tmp_path, golden):
  fill = lambda key, shape: np.full(shape, 0.5)
  sizes = dict(width=512, depth=8, heads=8, grid=8, labels=101)
  large = write(tmp_path / "large.safetensors", official_tensors(fill, **sizes))
  out = tmp_path / "out.safetensors"
  peak, written, _ = measure_memory(golden[1], large, out)
  size = large.stat().st_size
  assert size > 100e6
  assert 0.9 * size < peak < 1.3 * size  # also that the meter sees anything
  assert written < 1.3 * size


@pytest.mark.slow
def test_memory_of_the_released_size(tmp_path, golden):
  fill = lambda key, shape: np.full(shape, 0.5, np.float32)
  sizes = dict(width=1152, depth=28, heads=16, grid=16, labels=1001)
  large = write(tmp_path / "large.safetensors", official_tensors(fill, **sizes))
  size = large.stat().st_size
  assert size == pytest.approx(2.26e9, rel=0.01)
  out = tmp_path / "out.safetensors"
  peak, written, _ = measure_memory(golden[1], large, out)
  assert peak < 1.3 * size and written < 1.3 * size
