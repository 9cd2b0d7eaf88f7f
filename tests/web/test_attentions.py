"""What tokens read, in a network and in another one beside it."""

import jax
import numpy as np
import pytest

from configs import digits
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.generation.weights import Weights
from diffit_jax.web.attentions import Attentions

pytestmark = pytest.mark.web


def made_up(variant: str, **fields) -> Weights:
  """A network of random weights."""
  config = digits.get_config(f"debug,{variant}")
  config.model.update(fields)
  model, side = models.make_model(config.model), config.data.resolution
  init = lambda: model.init(
    jax.random.key(0), np.zeros((1, side, side, 1)), np.zeros(1)
  )["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: np.float32(rng.normal(size=leaf.shape) / 4),
    jax.eval_shape(init),
  )
  return Weights(params, config, step=0, ema="edm", source="made up")


def read(found: Attentions, params, sigma: float = 1.0) -> list[np.ndarray]:
  x = np.random.default_rng(1).normal(size=(1, 8, 8, 1)).astype(np.float32)
  place = found.blocks[0], (5, 2), None
  return found.read(
    params, x, np.float32([sigma]), np.int32([3]), *place
  ).maps


def test_each_network_reads_as_if_it_were_alone():
  tmsa, plain = made_up("time_in=tmsa"), made_up("time_in=plain")
  both = Attentions(tmsa, plain, "runs/plain")
  assert both.titles == [tmsa.config.name, plain.config.name]
  assert Attentions(tmsa, tmsa, "runs/x").titles[1] == "runs/x"
  maps = read(both, tmsa.params)
  for seen, alone in zip(maps, (tmsa, plain), strict=True):
    (expected,) = read(Attentions(alone, None, None), alone.params)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_allclose(np.nansum(seen), 1, rtol=1e-5)
  assert np.nanmax(np.abs(maps[0] - maps[1])) > 0.01


def test_another_grid_or_number_of_blocks_is_refused_in_one_sentence():
  own = made_up("time_in=tmsa")
  for other, message in (
    (made_up("blocks=2"), r"--beside=x has \d blocks .* and this network \d "),
    (
      made_up("time_in=plain", head_dim=4),
      "--beside=x has 2 heads and a map of 8 x 8 tokens in encoder_0_block_0,"
      " and this network 1 and 8 x 8: both are to have the same$",
    ),
  ):
    with pytest.raises(UserError, match=message):
      Attentions(own, other, "x")


def test_a_token_or_a_head_that_is_not_there_is_refused():
  found = Attentions(made_up("time_in=tmsa"), None, None)
  block = found.blocks[0]
  found.check(block, (7, 7), 0)
  for token, head, message in (
    ((0, 8), None, "is not on the map of 8 x 8"),
    ((-1, 0), None, "is not on the map"),
    ((0, 0), 1, "head=1 must be from 0 to 0"),
  ):
    with pytest.raises(UserError, match=message):
      found.check(block, token, head)
