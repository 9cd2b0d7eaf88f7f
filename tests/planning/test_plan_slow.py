"""The paper's configs at full size, compiled for the slices they are meant for.

The bounds are those that the project set itself; figures printed by the command
are in docs/costs.md.
"""

import pytest

from configs import cifar10, ffhq64, imagenet256, imagenet512
from diffit_jax.planning import aot, figures, planner, topology

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("libtpu_environment")]
pytest.importorskip("libtpu")


def plan(config, name: str, **fields) -> dict:
  wanted = topology.parse(name)
  config = planner.changed(config.get_config(), fields)
  made = planner.make_plan(config, wanted, topology.devices(wanted))
  return figures.to_json(made)


def assert_no_stray_collectives(card: dict) -> None:
  assert card["collectives"]["collective-permute"] == 0
  assert card["collectives"]["all-to-all"] == 0


@pytest.mark.parametrize(
  "name, data, batch_size",
  [
    ("v5e:4x4", 1, 256),
    ("v5e:8x8", 4, 1024),
    ("v5e:16x16", 16, 4096),
    ("2xv5e:4x4", 2, 512),
  ],
)
def test_imagenet256(name, data, batch_size):
  """16 images per chip; the first is the paper's batch."""
  card = plan(imagenet256, name, batch_size=batch_size)
  assert card["mesh"] == {"data": data, "fsdp": 16}
  assert card["arguments_gib"] <= 0.55
  assert card["temporaries_gib"] <= 2.8
  assert card["fits"]
  assert card["flops_ratio"] <= 1.02
  assert_no_stray_collectives(card)
  assert card["wire_gb"] <= 4.6


def test_imagenet512():
  card = plan(imagenet512, "v5e:16x16")
  assert card["arguments_gib"] + card["temporaries_gib"] <= 2.7
  assert card["flops_ratio"] <= 1.05
  assert_no_stray_collectives(card)


@pytest.mark.parametrize(
  "config, name", [(cifar10, "v5e:2x4"), (ffhq64, "v5e:4x4")]
)
def test_image_models(config, name):
  card = plan(config, name)
  assert card["fits"]
  assert card["flops_ratio"] == pytest.approx(1, abs=1e-3)
  assert_no_stray_collectives(card)


@pytest.mark.parametrize("config", [imagenet256, imagenet512])
def test_flops_without_remat_are_the_formula(config):
  devices = topology.devices(topology.parse("cpu:1"))
  fields = {"model.remat": "none", "batch_size": 1}
  step = aot.trace(planner.changed(config.get_config(), fields), devices)
  flops = 2 * sum(product.macs for product in step.products)
  assert flops / (6 * step.forward_macs.total) == pytest.approx(1, abs=1e-3)
