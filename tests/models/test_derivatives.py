"""Derivatives written by hand: those of the plain forms, with less kept."""

import functools
import re

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.models.attention import softmax
from diffit_jax.models.blocks import gelu
from diffit_jax.models.flat_product import flat_dot_general
from diffit_jax.models.layer_norm import layer_norm

X = np.random.default_rng(0).normal(size=(3, 5, 7)) * 4


def flax_layer_norm(x):
  return nn.LayerNorm(
    epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False
  ).apply({}, x)


@pytest.mark.parametrize(
  "ours, plain",
  [
    (gelu, functools.partial(jax.nn.gelu, approximate=True)),
    (softmax, functools.partial(jax.nn.softmax, axis=-1)),
    (functools.partial(layer_norm, dtype=np.float64), flax_layer_norm),
  ],
  ids=["gelu", "softmax", "layer_norm"],
)
def test_values_and_two_derivatives_are_those_of_the_plain_form(
  ours, plain, x64
):
  weight = np.random.default_rng(1).normal(size=X.shape)
  first = lambda f: jax.grad(lambda x: jnp.sum(weight * f(x)))
  second = lambda f: jax.grad(lambda x: jnp.sum(first(f)(x) ** 2))
  np.testing.assert_array_equal(ours(X), plain(X))
  for order in (first, second):
    found, expected = order(ours)(X), order(plain)(X)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_the_slope_of_gelu_is_rounded_once_in_bfloat16():
  x = jnp.linspace(-9, 9, 2001).astype(jnp.bfloat16)
  exact = jax.vmap(jax.grad(jax.nn.gelu))(x.astype(jnp.float32))
  found = jax.vmap(jax.grad(gelu))(x)
  assert found.dtype == jnp.bfloat16
  # Half a unit in the last place of numbers up to 2.
  np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=2.0**-8)


@pytest.mark.parametrize("function", [gelu, softmax])
def test_one_array_is_kept(function):
  x = jnp.asarray(X, jnp.float32)
  kept = jax.tree.leaves(jax.vjp(function, x)[1])
  assert [leaf.shape for leaf in kept if leaf.size > 1] == [x.shape]


def test_layer_norm_keeps_its_result_and_a_number_per_token():
  x = jnp.asarray(X, jnp.float32)
  normalise = functools.partial(layer_norm, dtype=x.dtype)
  kept = jax.tree.leaves(jax.vjp(normalise, x)[1])
  shapes = [leaf.shape for leaf in kept if leaf.size > 1]
  assert sorted(shapes) == [(3, 5, 1), (3, 5, 7)]


def test_each_residual_sum_of_the_backward_pass_is_computed_once():
  """No fused loop reads more arrays in a network that is twice as deep."""

  def widest_fusion(depth):
    def loss(kernels, x):
      for kernel in kernels:
        x = x + jnp.tanh(layer_norm(x, x.dtype) @ kernel)
      return jnp.sum(x**2)

    arrays = jnp.ones((depth, 8, 8)), jnp.ones((4, 8))
    program = jax.jit(jax.grad(loss)).lower(*arrays).compile().as_text()
    fusions = re.findall(r" fusion\((.*?)\), kind=kLoop", program)
    return max(operands.count("%") for operands in fusions)

  assert widest_fusion(8) == widest_fusion(4)


def test_flat_products_are_the_plain_ones(x64):
  kernel = np.random.default_rng(2).normal(size=(7, 4))
  numbers = (((2,), (0,)), ((), ()))
  out, pull = jax.vjp(lambda x, k: flat_dot_general(x, k, numbers), X, kernel)
  other, push = jax.vjp(lambda x, k: lax.dot_general(x, k, numbers), X, kernel)
  np.testing.assert_allclose(out, other, rtol=1e-13)
  cotangent = np.random.default_rng(3).normal(size=out.shape)
  for found, expected in zip(pull(cotangent), push(cotangent)):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_flat_products_contract_one_axis_each():
  """Also in both gradients, which is what they are for."""
  x, kernel = jnp.ones((3, 5, 7)), jnp.ones((7, 4))
  total = lambda x, k: flat_dot_general(x, k, (((2,), (0,)), ((), ()))).sum()
  jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, kernel)
  products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  assert len(products) == 3
  for product in products:
    assert {len(v.aval.shape) for v in product.invars} == {2}
