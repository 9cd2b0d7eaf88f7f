"""DiT's modulation and the ladder below DiffiT: sizes, equations, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.models.baselines.dit import DiT, DiTBlock
from diffit_jax.models.baselines.ladder import LadderRung
from diffit_jax.models.latent import LatentDiffiT


def normal(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape)


def shapes_of(model, side, channels):
  x = jnp.zeros((1, side, side, channels))
  return jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))[
    "params"
  ]


def size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def draw(shapes):
  rng = np.random.default_rng(0)
  scaled = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.3), "float32")
  return jax.tree.map(scaled, shapes)


class TestDiT:
  @pytest.mark.parametrize(
    "side, published", [(32, 675_129_632), (64, 676_014_368)]
  )
  def test_published_size(self, side, published):
    found = size(shapes_of(DiT(input_size=side), side, 4))
    assert found == 674_834_720
    assert found + (side // 2) ** 2 * 1152 == published

  def test_a_fresh_network_ignores_its_blocks(self):
    """All gates are zero: adaLN-Zero."""
    block = DiTBlock(num_heads=2)
    x = jnp.asarray(normal(2, 4, 4, 8), jnp.float32)
    time = jnp.asarray(normal(2, 6, seed=2), jnp.float32)
    params = jax.jit(block.init)(jax.random.key(0), x, time)
    np.testing.assert_array_equal(jax.jit(block.apply)(params, x, time), x)

  def test_block_is_its_equations(self):
    block = DiTBlock(num_heads=2)
    x, time = normal(2, 2, 2, 8), normal(2, 6, seed=2)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, time)["params"]
    params = draw(shapes)
    found = jax.jit(block.apply)(
      {"params": params}, x.astype("float32"), time.astype("float32")
    )
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    linear = lambda p, x: x @ p["kernel"] + p["bias"]

    def norm(x, shift, scale):
      x = x - x.mean(-1, keepdims=True)
      x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
      return x * (1 + scale) + shift

    def attention(x):
      q, k, v = np.split(linear(p["attn"]["qkv"], x), 3, -1)
      out = []
      for head in (slice(0, 4), slice(4, 8)):
        w = np.exp(q[:, head] @ k[:, head].T / 2)
        out.append(w / w.sum(-1, keepdims=True) @ v[:, head])
      return linear(p["attn"]["proj"], np.concatenate(out, -1))

    def mlp(x):
      h = linear(p["mlp"]["fc1"], x)
      h = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
      return linear(p["mlp"]["fc2"], h)

    for i in range(2):
      silu = time[i] / (1 + np.exp(-time[i]))
      b1, g1, a1, b2, g2, a2 = np.split(linear(p["modulation"], silu), 6)
      h = x[i].reshape(4, 8)
      h = h + a1 * attention(norm(h, b1, g1))
      h = h + a2 * mlp(norm(h, b2, g2))
      np.testing.assert_allclose(found[i].reshape(4, 8), h, atol=2e-5)

  def test_scanned_and_unrolled_are_the_same(self):
    sizes = dict(input_size=4, hidden_dim=16, depth=2, num_heads=2)
    scanned = DiT(**sizes, num_classes=3)
    unrolled = DiT(**sizes, num_classes=3, scan_blocks=False)
    from diffit_jax.models.latent import unstack_blocks

    params = draw(shapes_of(scanned, 4, 4))
    x = jnp.asarray(normal(2, 4, 4, 4), jnp.float32)
    t, labels = jnp.array([3, 700]), jnp.array([0, 3])
    run = lambda model, params: jax.jit(model.apply)(
      {"params": params}, x, t, labels
    )
    np.testing.assert_allclose(
      run(scanned, params), run(unrolled, unstack_blocks(params)), atol=2e-5
    )
    assert "relative_position_bias_table" not in str(jax.tree.structure(params))
    assert isinstance(scanned, LatentDiffiT)


TINY = dict(
  base_channels=8, channel_mult=(1, 2, 2), num_blocks=1, window_size=4,
  head_dim=8, time_dim=16, vit_dim=16, vit_depth=4, vit_heads=2,
)  # fmt: skip


def rung(name, **fields):
  return LadderRung(rung=name, **(TINY | fields))


class TestLadder:
  @pytest.mark.slow
  @pytest.mark.parametrize("name", "ABCD")
  def test_every_parameter_matters(self, name):
    """Time too: the output moves with each, so nothing is left aside."""
    model = rung(name, channel_mult=(1, 2))
    params = draw(shapes_of(model, 8, 3))
    x = jnp.asarray(normal(2, 8, 8, 3), jnp.float32)

    def total(params, level):
      out = model.apply({"params": params}, x, level)
      assert out.shape == x.shape
      weights = jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)
      return jnp.sum(jnp.sin(weights) * out)

    level = jnp.array([0.3, -0.5])
    grads, by_time = jax.jit(jax.grad(total, (0, 1)))(params, level)
    assert jnp.abs(by_time).min() > 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      name = jax.tree_util.keystr(path)
      if "map_augment" not in name:  # of labels that are zeros here
        assert jnp.abs(grad).max() > 0, name

  def test_paths_are_what_the_table_says(self):
    has = lambda tree, word: word in str(jax.tree.structure(tree))
    for name, (encoder, decoder) in {
      "A": ("vit", "mla"),
      "B": ("plain", "mla"),
      "C": ("plain", "plain"),
      "D": ("diffit", "plain"),
    }.items():
      tree = shapes_of(rung(name), 16, 3)
      inside = {key: value for key, value in tree.items() if "block" in key}
      enc = {k: v for k, v in inside.items() if k.startswith("encoder")}
      dec = {k: v for k, v in inside.items() if k.startswith("decoder")}
      assert ("vit_0" in tree) == (encoder == "vit") != bool(enc)
      assert ("mla_0_in" in tree) == (decoder == "mla") != bool(dec)
      assert has(enc, "qkv_temb") == (encoder == "diffit")
      assert not has(dec, "qkv_temb") and not has(dec, "bias_table")

  def test_time_is_added_once_per_stage(self):
    tree = shapes_of(rung("C", num_blocks=3), 16, 3)
    timed = lambda tree: sorted(
      key
      for key, value in tree.items()
      if isinstance(value, dict) and "time" in value
    )
    assert timed(tree) == [
      "decoder_0_block_0",
      "decoder_1_block_0",
      "encoder_0_block_0",
      "encoder_1_block_0",
      "encoder_2_block_0",
    ]
    tree = shapes_of(rung("A", vit_depth=12), 16, 3)
    assert timed(tree) == ["vit_0", "vit_3", "vit_6", "vit_9"]

  def test_vit_base_is_its_published_size(self):
    """12 layers of 768 are 85.1 M; what stands around them is listed."""
    tree = shapes_of(LadderRung(rung="A", channel_mult=(1, 2, 2)), 32, 3)
    layer = 12 * 768**2 + 13 * 768 - 4 * 768  # without the norms' 4 x 768
    blocks = sum(size(tree[f"vit_{i}"]["block"]) for i in range(12))
    assert blocks == 12 * layer
    assert tree["positions"].shape == (8, 8, 768)

  def test_refusals(self):
    for fields, message in (
      (dict(rung="F"), "model.rung='F': use one of"),
      (dict(rung="A", patch_size=5), "patch_size=5 does not divide"),
      (dict(rung="A", vit_depth=6), "vit_depth=6 must be a multiple of 4"),
    ):
      with pytest.raises(UserError, match=message):
        shapes_of(LadderRung(**(TINY | fields)), 16, 3)
