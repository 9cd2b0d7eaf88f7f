"""TMSA against the golden values, plain attention and its own limits."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.models import attention
from diffit_jax.models.compute import Compute
from diffit_jax.models.kernels import plain
from goldens import hfill

HEADS, CHANNELS, TIME = 2, 8, 12


def golden_params(side):
  """Parameters of the golden TMSA, from PyTorch's [out, in] to [in, out]."""
  dense = lambda name, rows: {
    "kernel": hfill(f"{name}.weight", (3 * CHANNELS, rows), 0.5).T,
    "bias": hfill(f"{name}.bias", (3 * CHANNELS,), 0.5),
  }
  table = "relative_position_bias_table"
  params = {
    table: hfill(table, ((2 * side - 1) ** 2, HEADS), 0.5),
    "qkv": dense("qkv", CHANNELS),
    "qkv_temb": dense("qkv_temb", TIME),
    "proj": {
      "kernel": hfill("proj.weight", (CHANNELS, CHANNELS), 0.5).T,
      "bias": hfill("proj.bias", (CHANNELS,), 0.5),
    },
  }
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)


def golden_input():
  x = np.sin(0.3 * np.arange(2 * 4 * 4 * CHANNELS) + 1).reshape(2, 4, 4, -1)
  time = np.cos(0.5 * np.arange(2 * TIME)).reshape(2, TIME)
  return jnp.asarray(x, jnp.float32), jnp.asarray(time, jnp.float32)


def apply(params, x, time, window_size=None):
  module = attention.TMSA(HEADS, window_size)
  return jax.jit(module.apply)({"params": params}, x, time)


def test_windowed_golden():
  out = np.asarray(apply(golden_params(2), *golden_input(), window_size=2))
  expected_first = [
      -0.12491678, 0.43574143, -1.1814663, -0.44244219,
      1.5029343, -2.4599967, -0.78861203, -0.24148859,
  ]  # fmt: skip
  expected_last = [
      0.3228211, 0.16689062, -0.7300373, 0.2858895,
      0.94244342, -1.4965852, -0.81910219, -0.49733566,
  ]  # fmt: skip
  np.testing.assert_allclose(out[0, 0, 0], expected_first, atol=2e-6)
  np.testing.assert_allclose(out[1, 3, 2], expected_last, atol=2e-6)
  # 256 terms of 2e-6 each, rounding errors of random sign.
  np.testing.assert_allclose(out.sum(), -90.067201878, atol=3e-5)
  np.testing.assert_allclose(np.abs(out).sum(), 209.660310816, atol=3e-5)


def test_global_golden():
  out = np.asarray(apply(golden_params(4), *golden_input()))
  expected = [
      -0.067991493, 0.6617277, -1.1965863, -0.48368398,
      1.3988591, -2.3848584, -0.86301727, -0.38296994,
  ]  # fmt: skip
  np.testing.assert_allclose(out[0, 0, 0], expected, atol=2e-6)
  np.testing.assert_allclose(out.sum(), -89.837691972, atol=3e-5)
  np.testing.assert_allclose(np.abs(out).sum(), 207.776164914, atol=3e-5)


def gather_bias(table, side):
  """The bias by its definition: an index for each pair of tokens."""
  row, col = np.divmod(np.arange(side**2), side)
  index = (row[:, None] - row + side - 1) * (2 * side - 1)
  index += col[:, None] - col + side - 1
  return index, np.moveaxis(np.asarray(table)[index], -1, 0)


def test_bias_index_of_a_2x2_window():
  index, _ = gather_bias(np.zeros((9, 1)), 2)
  assert index.tolist() == [
      [4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4],
  ]  # fmt: skip


@pytest.mark.parametrize("side", [1, 2, 3, 8, 16])
def test_bias_is_bit_equal_to_the_gather(side):
  table = jax.random.normal(jax.random.key(side), ((2 * side - 1) ** 2, 3))
  bias = jax.jit(plain.relative_position_bias, static_argnums=1)
  _, expected = gather_bias(table, side)
  np.testing.assert_array_equal(bias(table, side), expected)
  by_products = jax.jit(plain.spread_by_products, static_argnums=1)
  by_products = by_products(table.T.reshape(3, 2 * side - 1, -1), side)
  np.testing.assert_array_equal(by_products.reshape(expected.shape), expected)


def test_no_gather_or_scatter_in_forward_and_backward():
  loss = lambda t: plain.relative_position_bias(t, 4).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((49, 2))))
  assert "gather" not in text and "scatter" not in text


def numpy_attention(params, x, window):
  """Plain windowed attention with bias, float64, one window at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  b, height, width, c = x.shape
  _, bias = gather_bias(p["relative_position_bias_table"], window)
  out = np.zeros_like(x)
  for n in range(b):
    for i in range(0, height, window):
      for j in range(0, width, window):
        patch = np.s_[n, i : i + window, j : j + window]
        tokens = x[patch].reshape(-1, c)
        qkv = tokens @ p["qkv"]["kernel"] + p["qkv"]["bias"]
        q, k, v = np.split(qkv, 3, axis=1)
        merged = np.zeros_like(tokens)
        for head in range(HEADS):
          part = np.s_[:, head * c // HEADS : (head + 1) * c // HEADS]
          logits = q[part] @ k[part].T / np.sqrt(c / HEADS) + bias[head]
          weights = np.exp(logits - logits.max(1, keepdims=True))
          merged[part] = weights / weights.sum(1, keepdims=True) @ v[part]
        merged = merged @ p["proj"]["kernel"] + p["proj"]["bias"]
        out[patch] = merged.reshape(window, window, c)
  return out


@pytest.mark.parametrize("window", [1, 2, 4])
def test_zero_time_weights_equal_plain_attention(window):
  params = golden_params(window)
  params["qkv_temb"] = jax.tree.map(jnp.zeros_like, params["qkv_temb"])
  x, time = golden_input()
  out = apply(params, x, time, window)
  np.testing.assert_allclose(out, numpy_attention(params, x, window), atol=2e-6)


def test_time_token_acts_like_an_extended_token():
  """x W_s + x_t W_t is one linear map of [x; x_t] (paper, section 3.2)."""
  params, (x, time) = golden_params(4), golden_input()
  tokens = jnp.broadcast_to(time[:, None, None], (*x.shape[:3], TIME))
  both = jnp.concatenate([x, tokens], axis=-1)
  kernel = jnp.concatenate(
    [params["qkv"]["kernel"], params["qkv_temb"]["kernel"]]
  )
  qkv = both @ kernel + params["qkv"]["bias"] + params["qkv_temb"]["bias"]
  pattern = "b i j (s h d) -> s b h (i j) d"
  q, k, v = einops.rearrange(qkv, pattern, s=3, h=HEADS)
  bias = plain.relative_position_bias(
    params["relative_position_bias_table"], 4
  )
  out = plain.attend(q, k, v, bias)
  out = einops.rearrange(out, "b h (i j) d -> b i j (h d)", i=4)
  out = out @ params["proj"]["kernel"] + params["proj"]["bias"]
  np.testing.assert_allclose(apply(params, x, time), out, atol=2e-6)


@pytest.mark.parametrize("shape", [(2, 5, 5), (3, 1, 2, 5, 5)])
def test_derivatives_of_the_bias_are_those_of_the_formula(shape, x64):
  """Of one bias for all samples, and of one for each; both modes."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(3, 4, 2, 5, 6)) for _ in range(3))
  bias, tangent = rng.normal(size=(2, *shape))

  def formula(bias):
    weights = jnp.exp(q @ k.swapaxes(-1, -2) / 6**0.5 + bias)
    return weights / weights.sum(axis=-1, keepdims=True) @ v

  ours = lambda bias: plain.attend(q, k, v, bias)
  forward = lambda f: jax.jvp(f, (bias,), (tangent,))
  for found, wanted in zip(forward(ours), forward(formula)):
    np.testing.assert_allclose(found, wanted, atol=1e-12)
  gradient = lambda f: jax.jit(jax.grad(lambda b: jnp.sin(f(b)).sum()))(bias)
  np.testing.assert_allclose(gradient(ours), gradient(formula), atol=1e-12)


@pytest.mark.parametrize("window", [4, 5, 64])
def test_one_window_of_the_whole_map_is_global(window):
  params, inputs = golden_params(4), golden_input()
  np.testing.assert_array_equal(
    apply(params, *inputs, window), apply(params, *inputs)
  )


def test_windows_do_not_see_each_other():
  params, (x, time) = golden_params(2), golden_input()
  changed = apply(params, x.at[:, :2, :2].add(1.0), time, 2)
  same = apply(params, x, time, 2)
  np.testing.assert_array_equal(changed[:, 2:], same[:, 2:])
  np.testing.assert_array_equal(changed[:, :2, 2:], same[:, :2, 2:])
  assert np.abs(changed - same)[:, :2, :2].min() > 0


def test_non_square_maps_can_be_windowed():
  params, (x, time) = golden_params(2), golden_input()
  out = apply(params, x[:, :2], time, 2)
  np.testing.assert_array_equal(out, apply(params, x, time, 2)[:, :2])


def test_parameter_tree_is_the_documented_one():
  x, time = golden_input()
  shapes = jax.eval_shape(
    attention.TMSA(HEADS, 2).init, jax.random.key(0), x, time
  )["params"]
  assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(
    lambda a: a.shape, golden_params(2)
  )


def test_bias_table_init_is_not_cut_at_two_sigma():
  x, time = jnp.zeros((1, 16, 16, 8)), jnp.zeros((1, 4))
  params = jax.jit(attention.TMSA(2).init)(jax.random.key(0), x, time)["params"]
  table = params["relative_position_bias_table"]
  assert abs(float(table.std()) - 0.02) < 1e-3  # 1,922 draws: 0.0003 is 1 sigma
  assert float(jnp.abs(table).max()) > 0.05


@pytest.mark.parametrize(
  "window, shape, message",
  [
    (3, (1, 8, 8, 8), r"window_size=3 does not divide the 8x8.*\[1, 2, 4, 8\]"),
    (0, (1, 8, 8, 8), "window_size=0"),
    (None, (1, 4, 8, 8), "square feature map, not 4x8"),
    (2, (1, 4, 4, 7), "num_heads=2 must divide channels=7"),
  ],
)
def test_wrong_sizes_are_refused(window, shape, message):
  module = attention.TMSA(HEADS, window)
  with pytest.raises(UserError, match=message):
    module.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros((1, TIME)))


def test_bfloat16_keeps_softmax_and_parameters_in_float32():
  params, (x, time) = golden_params(4), golden_input()
  module = attention.TMSA(HEADS, compute=Compute(jnp.bfloat16))
  out = module.apply({"params": params}, x, time)
  assert out.dtype == jnp.bfloat16
  # bfloat16 keeps 8 bits: 2^-8 of values near 2, through three products.
  np.testing.assert_allclose(
    out.astype(jnp.float32), apply(params, x, time), atol=0.05
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, time)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
