"""Multiply-accumulates against closed forms and the published figures."""

import time

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from configs import imagenet256, imagenet512
from diffit_jax import models
from diffit_jax.interop import files
from diffit_jax.models import latent
from diffit_jax.parallel import mesh, sharding
from diffit_jax.training import cost, summary
from diffit_jax.training import program as program_lib


def test_products_convolutions_and_loops():
  dense = lambda x, w: x @ w
  macs = cost.count_macs(dense, jnp.ones((5, 3)), jnp.ones((3, 7)))
  assert (macs.total, macs.attention) == (5 * 3 * 7, 0)
  batched = lambda q, k: jnp.einsum("hnd,hmd->hnm", q, k)
  macs = cost.count_macs(batched, jnp.ones((2, 5, 3)), jnp.ones((2, 7, 3)))
  assert (macs.total, macs.attention) == (2 * 5 * 3 * 7, 2 * 5 * 3 * 7)
  conv = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  macs = cost.count_macs(conv, jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5)))
  assert macs.total == 4 * 4 * 5 * 3 * 3 * 3
  loop = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=6)[0]
  macs = cost.count_macs(jax.jit(loop), jnp.ones((5, 3)), jnp.ones((3, 3)))
  assert macs.total == 6 * 5 * 3 * 3


@pytest.mark.parametrize(
  "config, without_attention, total",
  [  # GMAC; the first is the "114 GFLOPs" of the paper's Table 9
    (imagenet256.get_config(), 114.279, 118.507),
    (imagenet256.get_config("depth=paper_text"), 122.441, 126.971),
    (imagenet512.get_config(), 456.778, 524.424),
    (imagenet512.get_config("depth=paper_text"), 489.401, 561.879),
  ],
  ids=["256", "256-30", "512", "512-30"],
)
def test_latent_model(config, without_attention, total):
  program = program_lib.build(config, jax.devices()[:1])
  macs = program_lib.forward_macs(
    program.model, program.abstract.params, config.data.resolution
  )
  assert round(macs.without_attention / 1e9, 3) == without_attention
  assert round(macs.total / 1e9, 3) == total
  formula = latent.macs(program.model)
  assert formula["with_attention"] == macs.total
  assert formula["attention"] == macs.attention


@pytest.mark.parametrize(
  "config, trainable, with_positions",
  [
    (imagenet256.get_config(), 561_035_232, 561_330_144),
    (imagenet256.get_config("depth=paper_text"), 600_906_752, 601_201_664),
    (imagenet512.get_config(), 562_382_816, 563_562_464),
    (imagenet512.get_config("depth=paper_text"), 602_350_592, 603_530_240),
  ],
  ids=["256", "256-30", "512", "512-30"],
)
def test_parameter_counts_of_the_configs(config, trainable, with_positions):
  shapes = files.parameter_shapes(config)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == trainable
  positions = models.make_model(config.model).grid ** 2 * 1152
  assert trainable + positions == with_positions


@pytest.mark.slow
def test_the_train_step_of_561_million_parameters_compiles_in_20_s():
  """The whole step of the paper's config, as --dry_run compiles it."""
  start = time.monotonic()
  text = summary.dry_run(imagenet256.get_config())
  assert "561,035,232 + 294,912 fixed positions = 561,330,144" in text
  assert time.monotonic() - start < 20


def test_of_branches_by_platform_one_counts():
  a = jnp.ones((2, 3))
  choose = lambda a: jax.lax.platform_dependent(
    a, cpu=lambda a: (a @ a.T) @ (a @ a.T), default=lambda a: a @ a.T
  )
  assert cost.count_macs(choose, a).total == 2 * 3 * 2
  jaxpr = jax.make_jaxpr(choose)(a).jaxpr
  on_cpu = cost.sum_macs(cost.products(jaxpr, platform="cpu"))
  assert on_cpu.total == 2 * (2 * 3 * 2) + 2 * 2 * 2


@pytest.mark.parametrize("said", [None, 1000])
def test_kernels_by_their_grid_or_what_they_say(said):
  """On each of 8 devices: a grid of 5 steps with one product."""

  def multiply(x, out):
    out[...] = jnp.dot(x[...], x[...].T)

  estimate = said and pl.CostEstimate(said, 0, 0)
  kernel = pl.pallas_call(
    multiply,
    grid=(5,),
    in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
    out_shape=jax.ShapeDtypeStruct((40, 8), jnp.float32),
    cost_estimate=estimate,
  )
  run = lambda x, _: kernel(x)
  split = sharding.per_device(mesh.make_mesh())(run)
  macs = cost.count_macs(split, jnp.ones((320, 128)), jnp.ones(1))
  one = said // 2 if said else 5 * 8 * 128 * 8
  assert macs == cost.Macs(8 * one, 8 * one if said else 0)
