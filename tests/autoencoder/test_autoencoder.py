"""The SD VAE: goldens, a float64 reference, chunks, jit, and refusals."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffit_jax import autoencoder
from diffit_jax.autoencoder import AutoencoderKL, load_autoencoder
from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers
from goldens import hfill

GOLDEN_SIZES = {
  "block_out_channels": [8, 16],
  "layers_per_block": 1,
  "norm_num_groups": 4,
  "latent_channels": 4,
}
THREE_LEVELS = {
  "block_out_channels": [4, 8, 8],  # changes width once, keeps it once
  "layers_per_block": 2,
  "norm_num_groups": 2,
  "latent_channels": 3,
}


def fill(sizes):
  """Tensors in the file's layout: hfill, and 1 + hfill for norm scales."""
  module = AutoencoderKL(
    **{**sizes, "block_out_channels": tuple(sizes["block_out_channels"])}
  )
  shapes = jax.tree_util.tree_leaves_with_path(
    autoencoder.abstract_params(module)
  )
  tensors = {}
  for path, leaf in shapes:
    name = diffusers.tensor_name(tuple(p.key for p in path))
    shape = diffusers._file_shape(leaf.shape)
    is_scale = len(shape) == 1 and name.endswith("weight")
    tensors[name] = (hfill(name, shape, 0.2) + is_scale).astype(np.float32)
  return tensors


def write(directory, sizes, tensors=None, **config):
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps({**sizes, **config}))
  save_file(
    tensors or fill(sizes),
    directory / "diffusion_pytorch_model.safetensors",
  )
  return directory


@pytest.fixture(scope="module", autouse=True)
def optimised():
  """The goldens are met to 1e-6 by the program that users run."""
  option = "jax_disable_most_optimizations"
  before = jax.config.read(option)
  autoencoder._apply.clear_cache()
  jax.config.update(option, False)
  yield
  autoencoder._apply.clear_cache()
  jax.config.update(option, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp("vae"), GOLDEN_SIZES)


@pytest.fixture(scope="module")
def vae(folder):
  return load_autoencoder(folder)


def images(num, height=8, width=8, channels=3):
  x = hfill("images", (num, height, width, channels), 1.0)
  return x.astype(np.float32)


# An independent forward in float64 and PyTorch's layout, from the architecture.


def np_conv(w, name, x, stride=1, pad=((1, 1), (1, 1))):
  kernel, bias = w[f"{name}.weight"], w[f"{name}.bias"]
  k = kernel.shape[-1]
  if k == 1:
    pad = ((0, 0), (0, 0))
  x = np.pad(x, ((0, 0), (0, 0), *pad))
  rows = (x.shape[2] - k) // stride + 1
  cols = (x.shape[3] - k) // stride + 1
  out = np.zeros((len(x), len(kernel), rows, cols)) + bias[:, None, None]
  for i in range(k):
    for j in range(k):
      window = x[
        :, :, i : i + stride * rows : stride, j : j + stride * cols : stride
      ]
      out += np.einsum("bihw,oi->bohw", window, kernel[:, :, i, j])
  return out


def np_norm(w, name, x, groups):
  parts = x.reshape(len(x), groups, -1)
  mean = parts.mean(-1, keepdims=True)
  variance = ((parts - mean) ** 2).mean(-1, keepdims=True)
  x = ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
  return (
    x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
  )


def np_silu(x):
  return x / (1 + np.exp(-x))


def np_resnet(w, name, x, groups):
  h = np_silu(np_norm(w, f"{name}.norm1", x, groups))
  h = np_conv(w, f"{name}.conv1", h)
  h = np_silu(np_norm(w, f"{name}.norm2", h, groups))
  h = np_conv(w, f"{name}.conv2", h)
  if f"{name}.conv_shortcut.weight" in w:
    x = np_conv(w, f"{name}.conv_shortcut", x)
  return x + h


def np_mid(w, name, x, groups):
  x = np_resnet(w, f"{name}.resnets.0", x, groups)
  attention = f"{name}.attentions.0"
  tokens = np_norm(w, f"{attention}.group_norm", x, groups)
  tokens = tokens.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
  linear = lambda part, t: (
    t @ w[f"{attention}.{part}.weight"].T + w[f"{attention}.{part}.bias"]
  )
  q, k, v = (linear(part, tokens) for part in ("to_q", "to_k", "to_v"))
  weights = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(x.shape[1]))
  weights /= weights.sum(-1, keepdims=True)
  out = linear("to_out.0", weights @ v).transpose(0, 2, 1)
  return np_resnet(w, f"{name}.resnets.1", x + out.reshape(x.shape), groups)


def np_out(w, name, x, groups):
  x = np_silu(np_norm(w, f"{name}.conv_norm_out", x, groups))
  return np_conv(w, f"{name}.conv_out", x)


def np_encode(w, sizes, x):
  groups, levels = sizes["norm_num_groups"], len(sizes["block_out_channels"])
  x = np_conv(w, "encoder.conv_in", x)
  for i in range(levels):
    level = f"encoder.down_blocks.{i}"
    for j in range(sizes["layers_per_block"]):
      x = np_resnet(w, f"{level}.resnets.{j}", x, groups)
    if i < levels - 1:
      name = f"{level}.downsamplers.0.conv"
      x = np_conv(w, name, x, stride=2, pad=((0, 1), (0, 1)))
  x = np_mid(w, "encoder.mid_block", x, groups)
  moments = np_conv(w, "quant_conv", np_out(w, "encoder", x, groups))
  mean, logvar = np.split(moments, 2, axis=1)
  return mean, np.clip(logvar, -30, 20)


def np_decode(w, sizes, z):
  groups, levels = sizes["norm_num_groups"], len(sizes["block_out_channels"])
  x = np_conv(w, "decoder.conv_in", np_conv(w, "post_quant_conv", z))
  x = np_mid(w, "decoder.mid_block", x, groups)
  for i in range(levels):
    level = f"decoder.up_blocks.{i}"
    for j in range(sizes["layers_per_block"] + 1):
      x = np_resnet(w, f"{level}.resnets.{j}", x, groups)
    if i < levels - 1:
      x = x.repeat(2, axis=2).repeat(2, axis=3)
      x = np_conv(w, f"{level}.upsamplers.0.conv", x)
  return np_out(w, "decoder", x, groups)


def nchw(x):
  return np.transpose(x, (0, 3, 1, 2))


def nhwc(x):
  return np.transpose(x, (0, 2, 3, 1))


def relative_error(found, wanted):
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_golden_encode(vae):
  # VAE, GOLDENS.md; 1e-5: its figures are float32 sums of values of order one.
  x = np.sin(0.3 * np.arange(192) + 1).reshape(1, 3, 8, 8)
  mean, logvar = map(nchw, vae.encode(nhwc(x).astype(np.float32)))
  assert mean.sum() == pytest.approx(2.85671556, abs=1e-5)
  assert np.abs(mean).sum() == pytest.approx(12.13417579, abs=1e-5)
  np.testing.assert_allclose(
    mean[0, 0, 0],
    [0.13420272, 0.41223004, 0.092861863, 0.060785659],
    atol=1e-6,
  )
  np.testing.assert_allclose(
    logvar[0, 0, 0],
    [0.019175482, -0.11343588, -0.50736937, -0.052664027],
    atol=1e-6,
  )


def test_golden_decode(vae):
  z = np.cos(0.5 * np.arange(64)).reshape(1, 4, 4, 4)
  image = nchw(vae.decode(nhwc(z).astype(np.float32)))
  assert image.sum() == pytest.approx(28.96192913, abs=3e-5)
  assert np.abs(image).sum() == pytest.approx(92.65477045, abs=3e-5)
  np.testing.assert_allclose(
    image[0, 0, 0, :4],
    [-0.20293301, 0.43689074, 0.32572135, 0.28462831],
    atol=1e-6,
  )


@pytest.mark.slow
def test_three_levels_against_float64(tmp_path):
  tensors = fill(THREE_LEVELS)
  vae = load_autoencoder(write(tmp_path, THREE_LEVELS, tensors))
  w = {name: array.astype(np.float64) for name, array in tensors.items()}
  x = images(2, 16, 8)
  for found, wanted in zip(
    vae.encode(x), np_encode(w, THREE_LEVELS, nchw(x).astype(np.float64))
  ):
    assert found.shape == (2, 4, 2, 3)
    assert relative_error(nchw(found), wanted) < 1e-5
  z = hfill("latents", (2, 4, 2, 3), 2.0).astype(np.float32)
  wanted = np_decode(w, THREE_LEVELS, nchw(z).astype(np.float64))
  found = vae.decode(z)
  assert found.shape == (2, 16, 8, 3)
  assert relative_error(nchw(found), wanted) < 1e-5


@pytest.mark.parametrize("bias, limit", [(-100.0, -30.0), (100.0, 20.0)])
def test_logvar_is_clamped_and_mean_is_not(tmp_path, bias, limit):
  tensors = fill(GOLDEN_SIZES)
  tensors["quant_conv.bias"] = np.full(8, bias, np.float32)
  vae = load_autoencoder(write(tmp_path, GOLDEN_SIZES, tensors))
  mean, logvar = vae.encode(images(1))
  np.testing.assert_array_equal(logvar, np.full((1, 4, 4, 4), limit))
  assert np.all(np.abs(mean) > 50)


def test_parameter_counts_of_the_sd_vae():
  # VAE in GOLDENS.md
  counts = {
    name: sum(leaf.size for leaf in jax.tree.leaves(part))
    for name, part in autoencoder.abstract_params(AutoencoderKL()).items()
  }
  assert counts == {
    "encoder": 34_163_592,
    "decoder": 49_490_179,
    "quant_conv": 72,
    "post_quant_conv": 20,
  }
  assert sum(counts.values()) == 83_653_863


def test_shapes_of_the_sd_vae():
  module = AutoencoderKL()
  params = {"params": autoencoder.abstract_params(module)}
  image = jax.ShapeDtypeStruct((2, 256, 512, 3), jnp.bfloat16)
  mean, logvar = jax.eval_shape(
    lambda p, x: module.apply(p, x, method="encode"), params, image
  )
  assert mean.shape == logvar.shape == (2, 32, 64, 4)
  assert mean.dtype == logvar.dtype == jnp.float32
  decoded = jax.eval_shape(
    lambda p, z: module.apply(p, z, method="decode"), params, mean
  )
  assert (decoded.shape, decoded.dtype) == ((2, 256, 512, 3), jnp.float32)


def test_every_product_has_full_precision(vae):
  program = jax.make_jaxpr(vae.module.apply)({"params": vae.params}, images(1))
  found = set()

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name in ("dot_general", "conv_general_dilated"):
        found.add(equation.params["precision"])
      for value in equation.params.values():
        if hasattr(value, "jaxpr"):
          visit(value.jaxpr)

  visit(program.jaxpr)
  assert found == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.slow
def test_chunks_equal_the_whole_batch(folder):
  vae = load_autoencoder(folder, chunk_size=2)
  x = images(5)
  whole_mean, whole_logvar = jax.jit(vae.encode_fn)(vae.params, x)
  whole = jax.jit(vae.decode_fn)(vae.params, whole_mean)
  for num in (0, 1, 2, 3, 5):
    mean, logvar = vae.encode(x[:num])
    decoded = vae.decode(whole_mean[:num])
    # Another batch size may sum in another order.
    np.testing.assert_allclose(mean, whole_mean[:num], atol=1e-6)
    np.testing.assert_allclose(logvar, whole_logvar[:num], atol=1e-6)
    np.testing.assert_allclose(decoded, whole[:num], atol=1e-5)
    assert decoded.shape == (num, 8, 8, 3)


def test_one_compilation_for_all_batch_sizes(folder):
  vae = load_autoencoder(folder, chunk_size=4)
  before = autoencoder._apply._cache_size()
  for num in (1, 2, 4, 7, 9):
    vae.encode(images(num, 4, 4))  # a size that no other test uses
  assert autoencoder._apply._cache_size() == before + 1
  for num in (1, 5, 8):
    vae.decode(images(num, 2, 2, channels=4))
  assert autoencoder._apply._cache_size() == before + 2


@pytest.mark.slow
def test_inside_another_jit(vae):
  x = images(2)

  @jax.jit
  def reconstruct(params, x):
    mean, _ = vae.encode_fn(params, x)
    return vae.decode_fn(params, mean), vae.decode(vae.encode(x)[0])

  wanted = vae.decode(vae.encode(x)[0])
  for found in reconstruct(vae.params, x):
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_identity_of_the_weights(folder, vae):
  contents = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
  assert vae.hash == hashlib.sha256(contents).hexdigest()
  assert vae.source == str(folder)
  assert vae.down_factor == 2
  assert vae.scaling_factor == 0.18215


def test_scaling_factor_from_the_config(tmp_path):
  vae = load_autoencoder(write(tmp_path, GOLDEN_SIZES, scaling_factor=0.13025))
  assert vae.scaling_factor == 0.13025


@pytest.mark.parametrize(
  "shape, message",
  [
    ((1, 8, 8, 4), r"images of shape \(1, 8, 8, 4\).*\[b, h, w, 3\]"),
    ((8, 8, 3), r"images of shape \(8, 8, 3\)"),
    ((1, 3, 8, 8), r"images of shape \(1, 3, 8, 8\)"),
    ((1, 8, 7, 3), "8x7 pixels do not fit.*multiples of 2"),
    ((1, 0, 8, 3), "0x8 pixels do not fit"),
  ],
)
def test_images_that_do_not_fit(vae, shape, message):
  x = np.zeros(shape, np.float32)
  with pytest.raises(UserError, match=message):
    vae.encode(x)
  with pytest.raises(UserError, match=message):
    jax.jit(vae.encode_fn)(vae.params, x)


def test_integer_images_are_refused(vae):
  with pytest.raises(UserError, match=r"uint8: .*x / 127.5 - 1"):
    vae.encode(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (4, 4, 4), (1, 4, 0, 4)])
def test_latents_that_do_not_fit(vae, shape):
  z = np.zeros(shape, np.float32)
  with pytest.raises(UserError, match=r"latents of shape .*\[b, h, w, 4\]"):
    vae.decode(z)
  with pytest.raises(UserError, match="latents of shape"):
    vae.decode_fn(vae.params, z)


def test_chunk_size_must_be_positive(folder):
  with pytest.raises(UserError, match="chunk_size=0 must be at least 1"):
    load_autoencoder(folder, chunk_size=0)


def test_weights_of_another_config(tmp_path):
  write(tmp_path, GOLDEN_SIZES)
  sizes = {**GOLDEN_SIZES, "layers_per_block": 2}
  (tmp_path / "config.json").write_text(json.dumps(sizes))
  with pytest.raises(UserError, match="missing decoder.up_blocks.0.resnets.2"):
    load_autoencoder(tmp_path)


def test_truncated_weights(tmp_path):
  path = write(tmp_path, GOLDEN_SIZES) / "diffusion_pytorch_model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="not a whole safetensors file"):
    load_autoencoder(tmp_path)
