"""The roofline by hand, on a chip of round numbers."""

import pytest

from diffit_jax.planning import roofline, topology
from diffit_jax.planning.traffic import Traffic
from diffit_jax.training.cost import Product

CHIP = topology.Chip(
  bf16_flops=100e12,
  hbm_bytes=16e9,
  hbm_bandwidth=1e12,
  ici_bandwidth=200e9,
  ici_axes=2,
  dcn_bandwidth=10e9,
  max_chips=256,
)


def test_the_largest_part_decides_each_end():
  bound = roofline.bound(
    CHIP, flops=1e12, traffic=Traffic(40e9, 5e9, 6e9), wire_bytes=1e9
  )
  assert bound.compute == pytest.approx((10, 10))
  assert bound.hbm == pytest.approx((5, 40))
  assert bound.wire == pytest.approx((5, 20))  # all 4 links, or one of them
  assert bound.dcn == (0, 0)
  assert bound.step == pytest.approx((10, 40))
  assert bound.bound == ("compute", "hbm")
  slow = roofline.bound(CHIP, 1e12, Traffic(40e9, 5e9, 6e9), 1e9, dcn_bytes=1e9)
  assert slow.step == pytest.approx((100, 100))


@pytest.mark.parametrize(
  "dtypes, precision, passes",
  [
    (("bfloat16", "bfloat16"), "highest", 1),
    (("float32", "float32"), "default", 1),
    (("float32", "float32"), "high", 3),
    (("float32", "float32"), "highest", 6),
    (("bfloat16", "float32"), "highest", 6),
  ],
)
def test_passes_of_a_float32_product(dtypes, precision, passes):
  product = Product(50, False, dtypes, precision)
  assert roofline.bf16_flops([product]) == passes * 100
