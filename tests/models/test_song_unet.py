"""DDPM++ and NCSN++: golden values, published sizes, TMSA's place in them."""

import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import edm
from diffit_jax.models import embeddings
from diffit_jax.models.baselines import song_unet
from diffit_jax.models.baselines.song_unet import SongUNet
from goldens import hfill
from slow import slow

X = np.sin(0.3 * np.arange(2 * 3 * 8 * 8) + 1).reshape(2, 3, 8, 8)


def tiny(**fields):
  sizes = dict(base_channels=8, channel_mult=(1, 2), num_blocks=1)
  return SongUNet(**sizes, attention_sides=(4,), **fields)


def original_name(path: tuple[str, ...]) -> str:
  """Key of the PyTorch network that a parameter stands for, less its suffix."""
  if path[0] == "embedding":
    return f"model.{path[1]}"
  if path[0] in ("head_norm", "head"):
    return f"model.dec.8x8_aux_{'norm' if path[0] == 'head_norm' else 'conv'}"
  if path[0] == "tokenizer":
    return "model.enc.8x8_conv"
  side = {"0": "8x8", "1": "4x4"}
  coder, level, rest = re.fullmatch(r"(\w+?)coder_(\d)_(.*)", path[0]).groups()
  rest = rest.replace("block_", "block").removesuffix("_bias")
  name = f"model.{coder}c.{side[level]}_{rest}"
  name = name.replace("_aux", "_aux_residual")
  inner = [part for part in path[1:-1] if part != "attn"]
  return ".".join([name, *inner])


def fill(path: tuple[str, ...], shape) -> np.ndarray:
  """The golden value of a parameter, in its layout here."""
  is_bias = path[-1] == "bias" or path[-1].endswith("_aux_bias")
  name = original_name(path) + (".bias" if is_bias else ".weight")
  if path[-1] == "scale":
    return 1 + hfill(name, shape, 0.2)
  if path[-2:-1] == ("qkv",):  # (c, which) in the rows there, (which, c) here
    rows = hfill(name, (shape[-1], *shape[:-1]), 0.2)
    rows = rows.reshape(shape[-1] // 3, 3, -1).swapaxes(0, 1)
    return rows.reshape(shape[-1], *shape[:-1]).T
  if is_bias:
    return hfill(name, shape, 0.2)
  if len(shape) == 2:
    return hfill(name, shape[::-1], 0.2).T
  kh, kw, c_in, c_out = shape
  return hfill(name, (c_out, c_in, kh, kw), 0.2).transpose(2, 3, 1, 0)


def golden_params(model):
  x = jnp.zeros((1, 8, 8, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
  flat = traverse_util.flatten_dict(shapes["params"])
  filled = {
    path: jnp.asarray(fill(path, leaf.shape), jnp.float32)
    for path, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(filled)


@pytest.fixture()
def fixed_frequencies(monkeypatch):
  """The frequencies that the golden values were made with."""
  monkeypatch.setattr(
    embeddings,
    "fixed_frequencies",
    lambda num: hfill("model.map_noise.freqs", (num,), 16),
  )


@pytest.mark.parametrize(
  "pyramid, raw, raw_first, plain, labelled",
  [
    (
      False,
      (-95.603452, 186.627977),
      (0.122087, 0.3113462, 0.1944086, 0.6442584),
      (-38.173866, 103.592105),
      (-38.341856, (0.3372771, 0.4612094, 0.4504923, 0.6090772)),
    ),
    slow(
      True,
      (-107.770566, None),
      (0.1706307, 0.1255025, -0.04615103, 0.2118755),
      (-41.445497, None),
      (-41.872902, None),
    ),
  ],
  ids=["ddpmpp", "ncsnpp"],
)
def test_golden(pyramid, raw, raw_first, plain, labelled, fixed_frequencies):
  model = tiny(pyramid=pyramid)
  params = golden_params(model)
  x = jnp.asarray(X.transpose(0, 2, 3, 1), jnp.float32)
  apply = jax.jit(lambda *args: model.apply({"params": params}, *args))
  close = lambda got, want: np.testing.assert_allclose(
    got, want, atol=2e-6 * 192**0.5 * 5
  )
  F = apply(x, jnp.array([0.1, -0.2]))
  close(F.sum(), raw[0])
  if raw[1]:
    close(jnp.abs(F).sum(), raw[1])
  np.testing.assert_allclose(F[0, 0, :4, 0], raw_first, atol=3e-6)

  def denoise(labels):
    network = lambda x, c_noise: apply(x, c_noise, None, labels)
    sigma = jnp.array([0.7, 3.0])
    process = edm.make({"sigma_data": 0.5, "P_mean": -1.2, "P_std": 1.2})
    return process.denoise(network, x, sigma)

  D = denoise(None)
  close(D.sum(), plain[0])
  if plain[1]:
    close(jnp.abs(D).sum(), plain[1])
  D = denoise(jnp.asarray(hfill("aug", (2, 9), 1), jnp.float32))
  close(D.sum(), labelled[0])
  if labelled[1]:
    np.testing.assert_allclose(D[0, 0, :4, 0], labelled[1], atol=3e-6)


def count(**fields) -> int:
  model = SongUNet(**fields)
  x = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.slow
def test_published_sizes():
  assert count() == 55_733_891
  assert count(channel_mult=(1, 2, 2, 2)) == 61_805_571
  assert count(pyramid=True) == 56_397_827
  assert count(pyramid=True, channel_mult=(1, 2, 2, 2)) == 62_761_091


def test_tmsa_adds_a_map_of_time_and_a_bias_in_six_places():
  linear, tables = (512 + 1) * 3 * 256, (31**2, 15**2)
  expected = 6 * linear + 5 * tables[0] + tables[1]
  assert count(tmsa=True) - count() == expected


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_a_filter_and_keeps_constants(taps):
  x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype(np.float32)
  weights = np.array(taps) / sum(taps)
  pad = len(taps) // 2 - 1

  def down(line):
    line = np.pad(line, pad)
    return [line[i : i + len(taps)] @ weights for i in range(0, 6, 2)]

  def up(line):
    zeros = np.zeros(2 * len(line) - 1)
    zeros[::2] = line
    zeros = np.pad(zeros, len(taps) // 2)
    return [
      2 * zeros[i : i + len(taps)] @ weights for i in range(2 * len(line))
    ]

  for is_up, rule in ((False, down), (True, up)):
    want = np.apply_along_axis(rule, 2, np.apply_along_axis(rule, 1, x))
    found = song_unet.resample(jnp.asarray(x), taps, is_up)
    np.testing.assert_allclose(found, want, atol=1e-6)
    ones = song_unet.resample(jnp.ones((1, 8, 8, 1)), taps, is_up)
    np.testing.assert_allclose(ones[:, 2:-2, 2:-2], 1, atol=1e-6)
