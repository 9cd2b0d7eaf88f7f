"""Where time enters: each alternative against float64 numpy, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models import attention, blocks, embeddings
from diffit_jax.models.time_in import TIME_IN
from slow import all_but

HEADS, CHANNELS, TIME, SIDE, WINDOW = 2, 8, 6, 4, 2
FAST = ("tmsa", "rpb_time")  # the paper's, and the alternative nearest to it
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, SIDE, SIDE, CHANNELS))
T = RNG.normal(size=(3, TIME))


def draw(module):
  """Parameters of order 0.5, so that no term is small."""
  x, t = jnp.zeros_like(X, jnp.float32), jnp.zeros_like(T, jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, t)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.5), shapes)


def run(module, params, x=X, t=T):
  as_float32 = lambda tree: jax.tree.map(
    lambda a: jnp.asarray(a, jnp.float32), tree
  )
  return jax.jit(module.apply)(
    {"params": as_float32(params)}, *as_float32((x, t))
  )


def attention_at(name):
  return attention.attention_with(name, HEADS, WINDOW)


def linear(params, x):
  return x @ params["kernel"] + params["bias"]


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def attend(params, x, t, name):
  """One sample, window by window, token by token; x [h, w, c], t [ct]."""
  qkv = linear(params["qkv"], x)
  if name == "tmsa":
    qkv = qkv + linear(params["qkv_temb"], t)
  table = params.get("relative_position_bias_table")
  if name == "rpb_time":
    table = table + linear(params["rpb_temb"], t).reshape(table.shape)
  out = np.zeros_like(x)
  d = CHANNELS // HEADS
  places = [(i, j) for i in range(WINDOW) for j in range(WINDOW)]
  for top in range(0, SIDE, WINDOW):
    for left in range(0, SIDE, WINDOW):
      rows = np.array([qkv[top + i, left + j] for i, j in places])
      for head in range(HEADS):
        q, k, v = (
          rows[:, n * CHANNELS + head * d : n * CHANNELS + (head + 1) * d]
          for n in range(3)
        )
        logits = q @ k.T / np.sqrt(d)
        if table is not None:
          for n, (i, j) in enumerate(places):
            for m, (k_i, k_j) in enumerate(places):
              row, column = i - k_i + WINDOW - 1, j - k_j + WINDOW - 1
              logits[n, m] += table[row * (2 * WINDOW - 1) + column, head]
        values = softmax(logits) @ v
        for n, (i, j) in enumerate(places):
          out[top + i, left + j, head * d : (head + 1) * d] = values[n]
  out = linear(params["proj"], out)
  if name == "separate":
    out = out + linear(params["time_value"], t)
  return out


@pytest.mark.parametrize("name", TIME_IN)
def test_attention_is_what_the_table_says(name):
  module = attention_at(name)
  params = draw(module)
  want = [attend(params, x, t, name) for x, t in zip(X, T)]
  np.testing.assert_allclose(run(module, params), want, atol=2e-5)


@pytest.mark.parametrize("name", all_but(FAST, TIME_IN))
def test_the_block_is_equations_7_and_8_around_it(name):
  module = blocks.DiffiTBlock(HEADS, WINDOW, time_in=name)
  params = draw(module)

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

  def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

  for i in range(len(X)):
    x = X[i] + attend(params["attn"], norm(X[i]), T[i], name)
    h = norm(x)
    if name == "mlp_time":
      h = h + linear(params["mlp_temb"], T[i])
    x = x + linear(params["mlp"]["fc2"], gelu(linear(params["mlp"]["fc1"], h)))
    np.testing.assert_allclose(run(module, params)[i], x, atol=1e-4)


@pytest.mark.parametrize(
  "name", all_but(FAST, sorted(set(TIME_IN) - {"plain", "none"}))
)
def test_time_enters_in_one_place_and_there_it_counts(name):
  """Without its linear map the block is one without time."""
  module = blocks.DiffiTBlock(HEADS, WINDOW, time_in=name)
  params = draw(module)
  entries = {
    "tmsa": ("attn", "qkv_temb"),
    "rpb_time": ("attn", "rpb_temb"),
    "separate": ("attn", "time_value"),
    "mlp_time": ("mlp_temb",),
  }
  changed = run(module, params) - run(module, params, t=T[::-1])
  assert np.abs(changed[0]).max() > 0.01
  # Not only as a shift of all tokens: of a window, too, they differ.
  if name in ("tmsa", "rpb_time"):
    assert np.std(changed[0, :WINDOW, :WINDOW], (0, 1)).max() > 0.01
  *path, last = entries[name]
  tree = params
  for key in path:
    tree = tree[key]
  tree[last] = jax.tree.map(np.zeros_like, tree[last])
  np.testing.assert_array_equal(
    run(module, params), run(module, params, t=T[::-1])
  )
  plain = blocks.DiffiTBlock(HEADS, WINDOW, time_in="plain")
  np.testing.assert_allclose(
    run(module, params), run(plain, pick(draw(plain), params)), atol=1e-5
  )


def pick(wanted, found):
  """What `wanted` names, of `found`; zeros for what it has not."""
  return {
    key: pick(value, found.get(key, {}))
    if isinstance(value, dict)
    else found.get(key, np.zeros_like(value))
    for key, value in wanted.items()
  }


def test_fourier_embedding():
  """Frequencies fixed, of standard deviation 16; sines first, as positional."""
  f = embeddings.fixed_frequencies(4096)
  assert abs(f.std() - 16) < 0.5 and abs(f.mean()) < 1
  np.testing.assert_array_equal(f, embeddings.fixed_frequencies(4096))
  x = np.array([0.25, -1.3])
  found = embeddings.fourier_embedding(jnp.asarray(x), f[:5])
  angles = 2 * np.pi * x[:, None] * f[:5]
  want = np.concatenate([np.sin(angles), np.cos(angles)], -1)
  np.testing.assert_allclose(found, want, atol=1e-4)  # of float32 angles


def count(arg):
  config = digits.get_config(arg)
  model = models.make_model(config.model)
  x = jnp.zeros((1, 8, 8, 1))
  params = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_parameter_counts_of_the_digits_variants():
  """What each alternative has instead of the linear map to q, k and v."""
  widths = {32: 0, 64: 0}
  config = digits.get_config()
  model = models.make_model(config.model)
  x = jnp.zeros((1, 8, 8, 1))
  tree = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
  for name, block in tree["params"].items():
    if "block" in name:
      widths[block["block"]["attn"]["proj"]["bias"].shape[0]] += 1
  linear = lambda n_in, n_out: (n_in + 1) * n_out
  table = lambda width: 49 * width // 16  # window 4, heads of 16
  total = lambda part: sum(n * part(width) for width, n in widths.items())
  without = count("") - total(lambda w: linear(128, 3 * w))
  assert count("time_in=plain") == without
  assert count("time_in=separate") == without + total(lambda w: linear(128, w))
  assert count("time_in=rpb_time") == without + total(
    lambda w: linear(128, table(w))
  )
  assert count("time_in=mlp_time") == without + total(
    lambda w: linear(128, w) - table(w)
  )
  assert count("embedding=fourier") == count("")


def test_refusals():
  x, t = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
  for fields, message in (
    (dict(time_in="sometimes"), "model.time_in='sometimes': use one of"),
    (dict(embedding="none"), "model.embedding='none': use one of"),
    (dict(time_in="rpb_time", attention="cudnn"), "has one each"),
    (dict(time_in="mlp_time", attention="cudnn"), "has none"),
  ):
    config = digits.get_config("debug")
    config.model.update(fields)
    model = models.make_model(config.model)
    with pytest.raises(UserError, match=message):
      jax.eval_shape(model.init, jax.random.key(0), x, t)
