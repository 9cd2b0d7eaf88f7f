"""The image-space network: counts, identities of its blocks, its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.models import ImageDiffiT, blocks, embeddings, make_model
from diffit_jax.models.attention import TMSA
from slow import slow

TINY = dict(
  base_channels=16,
  channel_mult=(1, 2),
  num_blocks=1,
  window_size=4,
  head_dim=8,
  time_dim=16,
)


def shapes(model, side=8, **kwargs):
  x = jnp.zeros((1, side, side, model.channels))
  return jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))[
    "params"
  ]


def num_params(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def random_params(model, side=8):
  """Every leaf random, so that no near-zero layer hides a mistake."""
  leaves, tree = jax.tree.flatten(shapes(model, side))
  draw = lambda i, leaf: np.random.default_rng([1, i]).normal(
    0, 0.2, leaf.shape
  )
  return tree.unflatten(
    [np.float32(draw(i, leaf)) for i, leaf in enumerate(leaves)]
  )


@functools.cache
def jitted(model):
  """Its `apply`, compiled once for every test that asks."""
  return jax.jit(model.apply)


# Counts of a separate implementation of the same description.
@pytest.mark.parametrize(
  "side, fields, expected",
  [
    slow(32, dict(channel_mult=(1, 2, 2), window_size=4), 28_682_819),
    slow(32, dict(channel_mult=(2, 2, 2), window_size=4), 39_352_531),
    (
      32,
      dict(channel_mult=(1, 2, 2), window_size=4, num_blocks=2),
      15_871_011,
    ),
    slow(64, dict(), 44_789_603),
    slow(64, dict(num_blocks=(1, 2, 2, 2)), 23_789_231),
  ],
)
def test_parameter_count(side, fields, expected):
  assert num_params(shapes(ImageDiffiT(**fields), side)) == expected


def test_resblock_is_equations_9_and_10():
  """Conv(SiLU(GN(x))) goes through the block; x is added outside it."""
  module = blocks.ResBlock(features=16, head_dim=8, window_size=2)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))
  time = jax.random.normal(jax.random.key(1), (2, 12))
  params = jax.eval_shape(module.init, jax.random.key(2), x, time)["params"]
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), params
  )
  p = params["norm"]
  # min(32, 16 / 4) = 4 groups of 4
  groups = np.asarray(x).reshape(2, 4, 4, 4, 4)
  mean = groups.mean((1, 2, 4), keepdims=True)
  var = groups.var((1, 2, 4), keepdims=True)
  h = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
  h = h * p["scale"] + p["bias"]
  h = h / (1 + np.exp(-h))
  h = jax.lax.conv_general_dilated(
    h,
    params["conv"]["kernel"],
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  h = h + params["conv"]["bias"]
  block = blocks.DiffiTBlock(num_heads=2, window_size=2)
  expected = jax.jit(block.apply)({"params": params["block"]}, h, time) + x
  out = jax.jit(module.apply)({"params": params}, x, time)
  np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


def test_block_is_equations_7_and_8():
  block = blocks.DiffiTBlock(num_heads=2)
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16)) * 3 + 1
  time = jax.random.normal(jax.random.key(1), (2, 12))
  params = jax.jit(block.init)(jax.random.key(2), x, time)["params"]

  def norm(x):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

  attention = TMSA(2)
  attend = jax.jit(attention.apply)
  h = x + attend({"params": params["attn"]}, norm(x), time)
  p = params["mlp"]
  z = norm(h) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
  cubic = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
  z = 0.5 * z * (1 + np.tanh(cubic))
  expected = h + z @ p["fc2"]["kernel"] + p["fc2"]["bias"]
  out = jax.jit(block.apply)({"params": params}, x, time)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  assert set(params) == {"attn", "mlp"}  # LayerNorm without affine parameters


def test_fresh_network_is_near_zero():
  """Head and last maps of the branches start at 1e-5 times Xavier."""
  model = ImageDiffiT(**TINY)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(1), x, jnp.zeros(2))["params"]
  out = jitted(model)({"params": params}, x, jnp.zeros(2))
  assert 0 < np.abs(out).max() < 1e-3
  block = params["encoder_0_block_0"]["block"]
  for kernel in (
    block["attn"]["proj"]["kernel"],
    block["mlp"]["fc2"]["kernel"],
  ):
    bound = 1e-5 * np.sqrt(6 / sum(kernel.shape))
    assert 0.9 * bound < np.abs(kernel).max() <= bound


def test_downsampling_pads_both_sides_by_one():
  """Stride 2, one zero before and after: XLA's SAME pads only after."""
  layer = blocks.conv(1, 3, jnp.float32, "down", stride=2)
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  out = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(1)}}, x)
  np.testing.assert_array_equal(out[0, :, :, 0], x[0, ::2, ::2, 0])


@pytest.mark.parametrize(
  "fields",
  [
    slow(dict(skip="add")),
    dict(skip="per_block", num_blocks=(2, 1)),
    slow(dict(resize="bilinear")),
    slow(dict(decoder_in_conv=True)),
    slow(dict(head_act="none")),
    slow(dict(num_classes=10, augment_dim=0)),
    slow(dict(window_size=None)),
    slow(dict(dtype=jnp.bfloat16)),
    slow(dict(channels=1, channel_mult=(1, 1, 1))),
  ],
  ids=str,
)
def test_options_change_the_network(fields):
  model = ImageDiffiT(**{**TINY, **fields})
  plain = ImageDiffiT(**TINY)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, model.channels))
  out = jitted(model)(
    {"params": random_params(model)}, x, jnp.array([0.3, -0.5])
  )
  assert out.shape == x.shape and out.dtype == jnp.float32
  assert np.isfinite(out).all()
  if model.channels == 3:
    same = jitted(plain)(
      {"params": random_params(plain)}, x, jnp.array([0.3, -0.5])
    )
    assert np.abs(out - same).max() > 1e-3


def test_per_block_skips_use_every_encoder_output():
  """Level 0 has 1 + 2 outputs, so its decoder has 3 blocks, each widened."""
  tree = shapes(ImageDiffiT(**{**TINY, "skip": "per_block", "num_blocks": 2}))
  for i, width in enumerate([32 + 16, 16 + 16, 16 + 16]):
    assert tree[f"decoder_0_block_{i}"]["conv"]["kernel"].shape[2] == width
  assert "decoder_0_block_3" not in tree


# The next two compare bits of two programs: op by op, not compiled as a whole.
ONE_LEVEL = {**TINY, "channel_mult": (1,)}


@pytest.mark.slow
def test_null_label_equals_no_label():
  model = ImageDiffiT(**ONE_LEVEL, num_classes=10)
  params = random_params(model)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  run = lambda labels: model.apply({"params": params}, x, jnp.zeros(2), labels)
  np.testing.assert_array_equal(run(jnp.array([10, 10])), run(None))
  assert np.abs(run(jnp.array([3, 10])) - run(None))[0].max() > 1e-4
  np.testing.assert_array_equal(run(jnp.array([3, 10]))[1], run(None)[1])


@pytest.mark.slow
def test_zero_augment_labels_equal_none():
  model = ImageDiffiT(**ONE_LEVEL)
  params = random_params(model)
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  run = lambda a: model.apply({"params": params}, x, jnp.zeros(2), None, a)
  np.testing.assert_array_equal(run(jnp.zeros((2, 9))), run(None))
  assert np.abs(run(jnp.ones((2, 9))) - run(None)).max() > 1e-4


def test_positional_embedding_golden():
  """x = 0.3, 8 channels: EDM's PositionalEmbedding with swapped halves."""
  expected = [
      0.295520207, 0.0139243165, 6.46330362e-4, 3e-5,
      0.955336489, 0.999903052, 0.999999791, 1,
  ]  # fmt: skip
  out = embeddings.positional_embedding(jnp.array([0.3]), 8)
  np.testing.assert_allclose(out[0], expected, atol=1e-7)


class TestDropout:
  model = ImageDiffiT(**TINY, dropout=0.3)

  def run(self, x, index, key=0):
    return jitted(self.model)(
      {"params": random_params(self.model)},
      x,
      jnp.zeros(len(x)),
      sample_index=jnp.asarray(index, jnp.uint32),
      rngs={"dropout": jax.random.key(key)},
    )

  def test_mask_follows_the_sample_and_not_the_row(self):
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    out = self.run(x, [5, 6, 7])
    moved = self.run(x[jnp.array([2, 0])], [7, 5])
    # Same masks; the batch size changes the order of sums at most.
    np.testing.assert_allclose(moved, out[jnp.array([2, 0])], atol=1e-5)

  def test_samples_steps_and_layers_differ(self):
    x = jnp.broadcast_to(
      jnp.linspace(-1, 1, 192).reshape(8, 8, 3), (2, 8, 8, 3)
    )
    out = self.run(x, [5, 6])
    assert np.abs(out[0] - out[1]).max() > 1e-3
    assert np.abs(out - self.run(x, [5, 6], key=1)).max() > 1e-3

  def test_off_without_an_index(self):
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    params = {"params": random_params(self.model)}
    plain = jitted(ImageDiffiT(**TINY))(params, x, jnp.zeros(1))
    np.testing.assert_array_equal(
      jitted(self.model)(params, x, jnp.zeros(1)), plain
    )

  def test_rate_and_scale(self):
    x = jnp.ones((4, 1000))
    out = blocks.drop_out(x, 0.25, jax.random.key(0), jnp.arange(4))
    np.testing.assert_allclose(out[out > 0], 1 / 0.75, rtol=1e-6)
    # 4,000 draws: a standard deviation of 0.007.
    assert abs(float((out == 0).mean()) - 0.25) < 0.03


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(skip="concatenate"), r"model.skip='concatenate': use one of"),
    (dict(num_blocks=(1, 2, 3)), "3 entries for 2 levels"),
    (dict(head_dim=24), "model.head_dim=24 does not divide"),
    (dict(channels=1), "3 channels, model.channels=1"),
    (dict(channel_mult=(1, 1, 1, 1, 1)), "cannot be halved 4 times"),
    (dict(window_size=3), "window_size=3 does not divide the 8x8"),
  ],
)
def test_wrong_sizes_are_refused(fields, message):
  model = ImageDiffiT(**{**TINY, **fields})
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    )


def test_labels_are_refused_by_an_unconditional_model():
  model = ImageDiffiT(**TINY)
  params = {"params": shapes(model)}
  with pytest.raises(UserError, match="unconditional"):
    jax.eval_shape(
      model.apply, params, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros(1)
    )


def test_make_model_from_a_config():
  config = dict(
    TINY, name="image_diffit", dtype="bfloat16", channel_mult=[1, 2]
  )
  model = make_model(config)
  assert model == ImageDiffiT(**TINY, dtype=jnp.dtype("bfloat16"))
  with pytest.raises(UserError, match="no field model.widow_size"):
    make_model(dict(config, widow_size=4))
  with pytest.raises(
    UserError, match=r"model.name='unet': use one of \['dit', 'image"
  ):
    make_model(dict(name="unet"))
