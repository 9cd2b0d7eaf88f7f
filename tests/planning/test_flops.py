"""Products of gradients: a step costs three forward passes, strided or not."""

import jax
import jax.numpy as jnp
import pytest

from diffit_jax.training import cost


def conv(x, w, stride=2):
  return jax.lax.conv_general_dilated(
    x,
    w,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_both_gradients_of_a_convolution_cost_as_much_as_it(stride):
  x, w = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
  forward = cost.count_macs(lambda x, w: conv(x, w, stride), x, w).total
  assert forward == (8 // stride) ** 2 * 9 * 3 * 5
  loss = lambda x, w: conv(x, w, stride).sum()
  both = cost.count_macs(jax.grad(loss, argnums=(0, 1)), x, w).total
  # XLA's gradient of the input runs over an array with zeros between elements,
  # which is stride^2 times as large; those zeros are not counted.
  assert both == 3 * forward


def test_dtypes_and_precision_of_products():
  def run(x, w):
    y = jnp.dot(x, w, precision=jax.lax.Precision.HIGH)
    with jax.default_matmul_precision("highest"):
      y = y @ w
    return y.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

  jaxpr = jax.make_jaxpr(run)(jnp.ones((2, 3)), jnp.ones((3, 3))).jaxpr
  found = list(cost.products(jaxpr))
  assert [p.precision for p in found] == ["high", "highest", "default"]
  assert found[0].dtypes == ("float32", "float32")
  assert found[2].dtypes == ("bfloat16", "bfloat16")
  assert [p.macs for p in found] == [18, 18, 18]
