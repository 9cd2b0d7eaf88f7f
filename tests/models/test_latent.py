"""The latent network: goldens, counts, its limits, scan and remat."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import guidance
from diffit_jax.errors import UserError
from diffit_jax.models import embeddings, latent
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.training import cost
from goldens import hfill
from slow import slow

TINY = LatentDiffiT(
  input_size=4, hidden_dim=16, depth=2, num_heads=2, num_classes=5
)


def golden_params():
  """Parameters of the golden model, from PyTorch's [out, in] to [in, out]."""

  def dense(key, rows, *columns):
    weight = hfill(f"{key}.weight", (rows, *columns), 0.2)
    return {
      "kernel": weight.reshape(rows, -1).T,
      "bias": hfill(f"{key}.bias", (rows,), 0.2),
    }

  def block(b):
    table = "relative_position_bias_table"
    attn = f"blocks.{b}.attn"
    return {
      "attn": {
        table: hfill(f"{attn}.{table}", (9, 2), 0.2),
        "qkv": dense(f"{attn}.qkv", 48, 16),
        "qkv_temb": dense(f"{attn}.qkv_temb", 48, 16),
        "proj": dense(f"{attn}.proj", 16, 16),
      },
      "mlp": {
        "fc1": dense(f"blocks.{b}.mlp.fc1", 64, 16),
        "fc2": dense(f"blocks.{b}.mlp.fc2", 16, 64),
      },
    }

  table = hfill("y_embedder.embedding_table.weight", (6, 16), 0.2)
  params = {
    "patch_embed": dense("x_embedder.proj", 16, 4, 2, 2),
    "time_embed": {
      "fc1": dense("t_embedder.mlp.0", 16, 256),
      "fc2": dense("t_embedder.mlp.2", 16, 16),
    },
    "label_embed": {"embedding": table},
    "head": dense("final_layer.linear", 32, 16),
    "blocks_0": block(0),
    "blocks_1": block(1),
  }
  return jax.tree.map(lambda a: np.asarray(a, np.float32), params)


def golden_input():
  x = np.sin(0.3 * np.arange(2 * 4 * 4 * 4) + 1).reshape(2, 4, 4, 4)
  return jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32)


def shapes(model):
  x = jax.ShapeDtypeStruct(
    (1, model.input_size, model.input_size, model.channels), jnp.float32
  )
  init = lambda key, x: model.init(key, x, jnp.zeros(1), jnp.zeros(1, int))
  return jax.eval_shape(init, jax.random.key(0), x)["params"]


def run(model, params, x, t, labels):
  return jax.jit(model.apply)(
    {"params": params}, x, jnp.asarray(t), jnp.asarray(labels)
  )


@pytest.mark.parametrize("scan", [True, False])
def test_golden(scan):
  params = golden_params()
  params = latent.stack_blocks(params) if scan else params
  out = run(
    TINY.clone(scan_blocks=scan), params, golden_input(), [10, 600], [1, 3]
  )
  out = np.moveaxis(np.asarray(out), -1, 1)
  first = [
      -0.1784457, -0.31802024, 0.26043664, -0.23467128,
      -0.079164013, 0.68998268, 0.25648981, 0.22512315,
  ]  # fmt: skip
  rows = [
    [-0.1784457, 0.0470009, -0.2739224, 0.0588230],
    [0.4458038, 0.2546704, 0.5525678, 0.4672499],
    [-0.3574818, 0.0796939, -0.3454841, 0.0720596],
    [0.7566399, 0.3059480, 0.7535597, 0.3131164],
  ]
  np.testing.assert_allclose(out[0, :, 0, 0], first, atol=2e-6)
  np.testing.assert_allclose(out[0, 0], rows, atol=2e-6)
  np.testing.assert_allclose(
    out[1, 7, 3], [0.0075347, 0.0817459, -0.1009605, 0.0301068], atol=2e-6
  )
  # 256 terms, rounding errors of random sign.
  np.testing.assert_allclose(out.sum(), 25.993026, atol=2e-5)
  np.testing.assert_allclose(np.abs(out).sum(), 67.655608, atol=2e-5)


def test_guided_golden():
  """Facts section 3: both halves see one latent, three channels are guided."""
  params = latent.stack_blocks(golden_params())
  network = lambda x, t, labels: run(TINY, params, x, t, labels)
  x, t = golden_input(), jnp.full(2, 100)
  cond, uncond = network(x, t, [1, 3]), network(x, t, [5, 5])
  rule = dict(scale=4.4, schedule="power_cosine", channels=3)
  out = guidance.apply_cfg(cond, uncond, t, **rule)
  kept = [
      -0.18872571, -0.10719562, 0.12158605, -0.2270437,
      -0.016721151, 0.7352909, 0.20614183, 0.23771823,
  ]  # fmt: skip
  # Guidance multiplies the 2e-6 of either prediction by up to 3.5 + 2.5.
  np.testing.assert_allclose(out[0, 0, 0], kept, atol=1e-5)
  null = [-0.23084444, -0.039558588, 0.737642, 0.20700259, 0.24118063]
  np.testing.assert_allclose(uncond[0, 0, 0, 3:], null, atol=2e-6)


def test_golden_positions():
  sin, cos, small = 0.84147098, 0.54030231, 0.00999983
  expected = [
    [0, 0, 1, 1, 0, 0, 1, 1],
    [sin, small, cos, 0.99995, 0, 0, 1, 1],  # row 0, column 1
    [0, 0, 1, 1, sin, small, cos, 0.99995],
    [sin, small, cos, 0.99995, sin, small, cos, 0.99995],
  ]
  table = embeddings.sincos_positions(8, 2)
  assert table.dtype == np.float32
  np.testing.assert_allclose(table, expected, atol=1e-7)


def test_golden_timestep_embedding():
  out = embeddings.timestep_embedding(jnp.array([10, 999]), 8)
  expected = [
      [
          -0.83907153, 0.54030231, 0.99500417, 0.99995,
          -0.54402111, 0.84147098, 0.09983342, 0.00999983,
      ],
      [
          0.99964985, 0.80745866, -0.8444697, 0.54114351,
          -0.02646075, -0.58992416, -0.53560333, 0.84093026,
      ],
  ]  # fmt: skip
  np.testing.assert_allclose(out, expected, atol=2e-7)


@pytest.mark.parametrize("shift, atol", [(0, 3e-7), (0.37, 6e-5)])
def test_timestep_embedding_at_every_step(shift, atol):
  """Whole steps to float32's own rounding; 999.37 itself is off by 3e-5."""
  t = np.arange(1000) + shift
  angles = t[:, None] * np.exp(-np.log(10000) * np.arange(128) / 128)
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  out = jax.jit(embeddings.timestep_embedding, static_argnums=1)(
    jnp.asarray(t), 256
  )
  np.testing.assert_allclose(out, expected, atol=atol)


@pytest.mark.parametrize(
  "side, depth, trainable, with_positions",
  [
    (32, 28, 561_035_232, 561_330_144),
    (32, 30, 600_906_752, 601_201_664),
    (64, 28, 562_382_816, 563_562_464),
    (64, 30, 602_350_592, 603_530_240),
  ],
)
def test_parameter_count(side, depth, trainable, with_positions):
  model = LatentDiffiT(input_size=side, depth=depth)
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes(model)))
  assert count == trainable
  positions = embeddings.sincos_positions(model.hidden_dim, model.grid)
  assert count + positions.size == with_positions


@pytest.mark.parametrize(
  "side, depth, without, with_attention",
  [
    (32, 28, 114.279, 118.507),
    (32, 30, 122.441, 126.971),
    (64, 28, 456.778, 524.424),
    (64, 30, 489.401, 561.879),
  ],
)
def test_macs(side, depth, without, with_attention):
  macs = latent.macs(LatentDiffiT(input_size=side, depth=depth))
  assert macs["without_attention"] / 1e9 == pytest.approx(without, abs=5e-4)
  assert macs["with_attention"] / 1e9 == pytest.approx(with_attention, abs=5e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_macs_are_those_of_the_traced_network(scan):
  model = LatentDiffiT(
    input_size=12,
    patch_size=3,
    hidden_dim=24,
    depth=3,
    num_heads=2,
    mlp_ratio=2.5,
    learn_sigma=False,
    scan_blocks=scan,
  )
  x, t = jnp.zeros((1, 12, 12, 4)), jnp.zeros(1)
  forward = lambda p: model.apply({"params": p}, x, t, jnp.zeros(1, int))
  counted = cost.count_macs(forward, shapes(model)).total
  assert latent.macs(model)["with_attention"] == counted


def test_stacking_is_lossless():
  params = golden_params()
  stacked = latent.stack_blocks(params)
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
    jnp.shape, shapes(TINY)
  )
  back = latent.unstack_blocks(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  on_device = latent.stack_blocks(jax.tree.map(jnp.asarray, params))
  jax.tree.map(np.testing.assert_array_equal, on_device, stacked)
  # Ten blocks and more keep their numbers' order, not their names'.
  many = {f"blocks_{i}": {"w": np.full(1, i)} for i in reversed(range(12))}
  stacked = latent.stack_blocks(many)["blocks"]["w"]
  np.testing.assert_array_equal(stacked[:, 0], np.arange(12))


def test_scanned_and_unrolled_agree():
  """To rounding: XLA fuses a loop's body otherwise than a straight line."""
  params = golden_params()
  inputs = golden_input(), [3, 999], [0, 5]
  scanned = run(TINY, latent.stack_blocks(params), *inputs)
  unrolled = run(TINY.clone(scan_blocks=False), params, *inputs)
  np.testing.assert_allclose(scanned, unrolled, atol=1e-6)


def test_scan_traces_one_block():
  def products(depth, **fields):
    model = TINY.clone(depth=depth, **fields)
    trace = lambda p: model.apply({"params": p}, golden_input(), jnp.ones(2))
    return str(jax.make_jaxpr(trace)(shapes(model))).count("dot_general")

  assert products(2) == products(9)
  assert products(2, scan_blocks=False) < products(9, scan_blocks=False)


def loss_gradient(remat, scan):
  model = TINY.clone(remat=remat, scan_blocks=scan)
  t, labels = jnp.array([10, 600]), jnp.arange(2)
  return jax.grad(
    lambda p: jnp.sum(
      model.apply({"params": p}, golden_input(), t, labels) ** 2
    )
  )


@pytest.mark.parametrize("scan", [True, slow(False)])
def test_remat_recomputes(scan):
  params = golden_params()
  params = latent.stack_blocks(params) if scan else params
  none, dots, full = (
    cost.count_macs(loss_gradient(remat, scan), params).total
    for remat in ("none", "dots", "full")
  )
  assert none < dots < full < 4 / 3 * none


@pytest.mark.slow
def test_remat_gives_the_same_gradients():
  params = latent.stack_blocks(golden_params())
  plain = jax.jit(loss_gradient("none", scan=True))(params)
  for remat in ("dots", "full"):
    again = jax.jit(loss_gradient(remat, scan=True))(params)
    # Gradients reach 20, so 2e-5 is 1e-6 of them.
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    jax.tree.map(same, plain, again)


def test_time_enters_through_tmsa_alone():
  params = latent.stack_blocks(golden_params())
  attn = params["blocks"]["attn"]
  attn["qkv_temb"] = jax.tree.map(np.zeros_like, attn["qkv_temb"])
  outs = [
    run(TINY, params, golden_input(), [t, t], [label, label])
    for t, label in [(0, 0), (999, 5)]
  ]
  np.testing.assert_array_equal(*outs)


def test_null_label_and_labels_without_a_row():
  params = latent.stack_blocks(golden_params())
  x, t = golden_input(), jnp.array([10, 600])
  null = run(TINY, params, x, t, [5, 5])
  default = jax.jit(TINY.apply)({"params": params}, x, t)
  np.testing.assert_allclose(default, null, atol=1e-6)
  for bad in (6, -1):
    out = np.asarray(run(TINY, params, x, t, [5, bad]))
    np.testing.assert_array_equal(out[0], null[0])
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("side, patch, channels", [(6, 2, 4), (8, 8, 1)])
def test_any_square_side_and_fractional_times_work(side, patch, channels):
  model = TINY.clone(input_size=side, patch_size=patch, channels=channels)
  params = jax.tree.map(lambda a: np.full(a.shape, 0.1), shapes(model))
  x = np.random.default_rng(0).normal(size=(1, side, side, channels))
  out = run(model, params, x, [998.5], [5])
  assert out.shape == (1, side, side, 2 * channels)
  assert np.isfinite(out).all()


def test_a_patch_goes_back_where_it_came_from():
  """A change of one patch, without attention, stays in that patch."""
  params = golden_params()
  for b in range(2):
    proj = params[f"blocks_{b}"]["attn"]["proj"]
    proj["kernel"] = np.zeros_like(proj["kernel"])
  params = latent.stack_blocks(params)
  x = golden_input()
  one = run(TINY, params, x, [1, 1], [1, 1])
  two = run(TINY, params, x.at[:, 2:, :2].add(1.0), [1, 1], [1, 1])
  changed = np.abs(one - two).max((0, 3)) > 0
  expected = np.zeros((4, 4), bool)
  expected[2:, :2] = True
  np.testing.assert_array_equal(changed, expected)


def test_initialisers():
  model = LatentDiffiT(
    input_size=16, hidden_dim=96, depth=3, num_heads=4, num_classes=200
  )
  x = jnp.zeros((1, 16, 16, 4))
  params = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(1))["params"]
  params = jax.tree.map(np.asarray, params)

  def check_uniform(kernel, fan_in, fan_out):
    bound = np.sqrt(6 / (fan_in + fan_out))
    assert np.abs(kernel).max() <= bound
    # Standard error of the deviation of n uniform draws: below 0.45/sqrt(n).
    deviation = kernel.std() * np.sqrt(3) / bound
    assert abs(deviation - 1) < 4 * 0.45 / np.sqrt(kernel.size)

  def check_normal(array):
    error = abs(array.std() / 0.02 - 1)
    assert error < 4 / np.sqrt(2 * array.size)
    assert np.abs(array).max() > 0.055  # not cut at two sigma

  for b in range(3):
    block = jax.tree.map(lambda leaf, b=b: leaf[b], params["blocks"])
    for name, out in (("qkv", 288), ("qkv_temb", 288), ("proj", 96)):
      check_uniform(block["attn"][name]["kernel"], 96, out)
      assert not block["attn"][name]["bias"].any()
    check_uniform(block["mlp"]["fc1"]["kernel"], 96, 384)
    check_uniform(block["mlp"]["fc2"]["kernel"], 384, 96)
    assert not block["mlp"]["fc1"]["bias"].any()
    assert not block["mlp"]["fc2"]["bias"].any()
    check_normal(block["attn"]["relative_position_bias_table"])
  first, second = params["blocks"]["mlp"]["fc1"]["kernel"][:2]
  assert np.abs(first - second).max() > 0.01
  check_uniform(params["patch_embed"]["kernel"], 16, 96)
  for name in ("fc1", "fc2"):
    check_normal(params["time_embed"][name]["kernel"])
    assert not params["time_embed"][name]["bias"].any()
  assert params["label_embed"]["embedding"].shape == (201, 96)
  check_normal(params["label_embed"]["embedding"])
  assert not params["patch_embed"]["bias"].any()
  assert not params["head"]["kernel"].any()
  assert not params["head"]["bias"].any()


def test_without_null_label_the_table_is_a_row_shorter():
  model = TINY.clone(null_label=False)
  assert shapes(model)["label_embed"]["embedding"].shape == (5, 16)
  with pytest.raises(UserError, match="no null label"):
    model.init(jax.random.key(0), golden_input(), jnp.zeros(2))


def test_bfloat16_blocks():
  params = latent.stack_blocks(golden_params())
  inputs = golden_input(), [10, 600], [1, 3]
  model = TINY.clone(dtype=jnp.bfloat16)
  out = run(model, params, *inputs)
  assert out.dtype == jnp.float32
  leaves = jax.tree.leaves(shapes(model))
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  # 8 bits, through two blocks, of outputs below 1.
  np.testing.assert_allclose(out, run(TINY, params, *inputs), atol=0.03)


def offset_map(table, grid):
  return np.asarray(table).reshape(*table.shape[:-2], 2 * grid - 1, -1, 2)


@pytest.mark.parametrize("scan", [True, False])
def test_resized_model_runs_and_shares_all_but_the_tables(scan):
  params = golden_params()
  params = latent.stack_blocks(params) if scan else params
  resized = latent.resize_params(params, 4, 10)
  model = TINY.clone(input_size=10, scan_blocks=scan)
  assert jax.tree.map(jnp.shape, resized) == jax.tree.map(
    jnp.shape, shapes(model)
  )
  assert resized["head"]["kernel"] is params["head"]["kernel"]
  out = run(model, resized, jnp.zeros((1, 10, 10, 4)), [5], [1])
  assert np.isfinite(out).all()
  same = latent.resize_params(params, 4, 4)
  jax.tree.map(np.testing.assert_array_equal, same, params)


def test_resizing_keeps_corners_centre_and_every_knot():
  """From 3 to 5 tokens every second offset is an old one."""
  table = np.asarray(hfill("table", (3, 25, 2), 1.0), np.float32)
  new = offset_map(latent.resize_bias_table(table, 3, 5), 5)
  np.testing.assert_allclose(new[:, ::2, ::2], offset_map(table, 3), atol=1e-6)
  for small in (2, 4):
    shrunk = offset_map(latent.resize_bias_table(table, 3, small), small)
    centre = shrunk[:, small - 1, small - 1]
    np.testing.assert_allclose(centre, table[:, 12], atol=1e-6)
    np.testing.assert_allclose(shrunk[:, 0, -1], table[:, 4], atol=1e-6)
  one = latent.resize_bias_table(jnp.asarray(table), 3, 1)
  np.testing.assert_allclose(one[:, 0], table[:, 12], atol=1e-6)
  np.testing.assert_allclose(
    latent.resize_bias_table(one, 1, 2), jnp.repeat(one, 9, 1), atol=1e-6
  )


def test_resizing_a_plane_gives_the_plane():
  plane = lambda grid: np.stack(
    [
      np.add.outer(2 * np.linspace(-1, 1, 2 * grid - 1), axis).ravel()
      for axis in (np.linspace(-1, 1, 2 * grid - 1), np.ones(2 * grid - 1))
    ],
    axis=-1,
  )
  for a, b in [(4, 8), (16, 32), (16, 7)]:
    out = latent.resize_bias_table(plane(a), a, b)
    np.testing.assert_allclose(out, plane(b), atol=1e-12)


def test_wrong_resizing_is_refused():
  params = golden_params()
  with pytest.raises(UserError, match="from_side=5 .* 2x2 tokens"):
    latent.resize_params(params, 5, 8)
  with pytest.raises(UserError, match="to_side=7 is not a multiple .* 2"):
    latent.resize_params(params, 4, 7)
  with pytest.raises(UserError, match="no blocks to stack"):
    latent.stack_blocks(latent.stack_blocks(params))
  with pytest.raises(UserError, match="no stacked blocks"):
    latent.unstack_blocks(params)


@pytest.mark.parametrize(
  "fields, shape, message",
  [
    ({}, (1, 8, 8, 4), "latents are 8x8x4, the model takes 4x4x4"),
    ({}, (1, 4, 4, 3), "latents are 4x4x3, the model takes 4x4x4"),
    ({"patch_size": 3}, (1, 4, 4, 4), "patch_size=3 does not divide .*=4"),
    ({"num_heads": 3}, (1, 4, 4, 4), "hidden_dim=16 .*num_heads=3"),
    ({"hidden_dim": 18}, (1, 4, 4, 4), "hidden_dim=18 must be a multiple"),
    ({"remat": "all"}, (1, 4, 4, 4), "remat='all': use one of"),
  ],
)
def test_wrong_sizes_are_refused(fields, shape, message):
  with pytest.raises(UserError, match=message):
    TINY.clone(**fields).init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_training_gradient_of_the_whole_model_compiles_in_20_s(remat):
  model = LatentDiffiT(remat=remat, dtype=jnp.bfloat16)

  def loss(params, x, t, labels, target):
    out = model.apply({"params": params}, x, t, labels)
    return jnp.mean((out - target) ** 2)

  arrays = [
    jax.ShapeDtypeStruct((8, *shape), dtype)
    for shape, dtype in [
      ((32, 32, 4), jnp.float32),
      ((), jnp.int32),
      ((), jnp.int32),
      ((32, 32, 8), jnp.float32),
    ]
  ]
  start = time.monotonic()
  jax.jit(jax.value_and_grad(loss)).lower(shapes(model), *arrays).compile()
  seconds = time.monotonic() - start
  assert seconds < 20, seconds
