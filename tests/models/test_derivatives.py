"""Derivatives written by hand: those of the plain forms, with less kept."""

import functools
import re

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.models.blocks import gelu
from diffit_jax.models.kernels.plain import softmax
from diffit_jax.models.layer_norm import layer_norm
from diffit_jax.models.linear import flat_dot_general

X = np.random.default_rng(0).normal(size=(3, 5, 7)) * 4


def of_dtype(function, dtype):
  return functools.partial(function, dtype=dtype)


def flax_layer_norm(x):
  return nn.LayerNorm(
    epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False
  ).apply({}, x)


@pytest.mark.parametrize(
  "ours, plain",
  [
    (gelu, functools.partial(jax.nn.gelu, approximate=True)),
    (of_dtype(softmax, np.float64), functools.partial(jax.nn.softmax, axis=-1)),
    (of_dtype(layer_norm, np.float64), flax_layer_norm),
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "function, others",
  [
    (lambda x, dtype: gelu(x.astype(dtype)), []),
    (softmax, []),
    (layer_norm, [((3, 5, 1), jnp.float32)]),  # a number per token
  ],
  ids=["gelu", "softmax", "layer_norm"],
)
def test_one_array_is_kept_in_the_dtype_of_the_result(function, others, dtype):
  x = jnp.asarray(X, jnp.float32)
  kept = jax.tree.leaves(jax.vjp(of_dtype(function, dtype), x)[1])
  kept = [(leaf.shape, leaf.dtype) for leaf in kept if leaf.size > 1]
  assert sorted(kept) == sorted([(x.shape, dtype), *others])


@pytest.mark.parametrize("function", [softmax, layer_norm])
def test_gradients_in_bfloat16_are_rounded_no_more_than_their_factors(function):
  """Of the result and its cotangent; the arithmetic between is float32."""
  x = jnp.asarray(X, jnp.float32)
  weight = jax.random.normal(jax.random.key(0), x.shape, jnp.bfloat16)
  pull = lambda dtype: jax.vjp(of_dtype(function, dtype), x)[1]
  (found,) = pull(jnp.bfloat16)(weight)
  (exact,) = pull(jnp.float32)(weight.astype(jnp.float32))
  assert found.dtype == jnp.float32
  y = function(x, jnp.float32)
  # bfloat16 rounds y by 2^-8 of it at most; it is a factor once and twice.
  normalises = function is layer_norm
  scale = 1 / jnp.std(x, -1, keepdims=True) if normalises else 1
  total = (jnp.mean if normalises else jnp.sum)(
    jnp.abs(y * weight), axis=-1, keepdims=True
  )
  bound = 2.0**-8 * (jnp.abs(y * weight) + 2 * jnp.abs(y) * total) * scale
  assert (jnp.abs(found - exact) <= bound + 1e-6).all()


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
