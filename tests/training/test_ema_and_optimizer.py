"""EMA decay, learning rate, gradient rule and Adam against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.run import ema
from diffit_jax.training import optimizer

EDM_EMA = dict(kind="halflife", halflife_images=500_000, rampup_ratio=0.05)
ADAM = dict(
  name="adam",
  learning_rate=1e-3,
  rampup_images=10_000_000,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  clip_norm=0.0,
  sanitise_gradients=True,
)


# EDM's values at a number of images seen; steps = images / batch.
@pytest.mark.parametrize(
  "batch, images, peak, rate, beta",
  [
    (512, 1e6, 1e-3, 1e-4, 0.9929273030),
    (512, 5e6, 1e-3, 5e-4, 0.9985814417),
    (512, 10e6, 1e-3, 1e-3, 0.9992904691),
    (512, 150e6, 1e-3, 1e-3, 0.9992904691),
    (256, 1e6, 2e-4, 2e-5, 0.9964573764),
    (256, 10e6, 2e-4, 2e-4, 0.9996451716),
  ],
)
def test_ramp_and_decay_golden(batch, images, peak, rate, beta):
  step = jnp.float32(images / batch)
  config = dict(ADAM, learning_rate=peak)
  out = optimizer.learning_rate(config, step, batch)
  np.testing.assert_allclose(out, rate, rtol=1e-6)
  # beta is near 1: float32 keeps it to 6e-8.
  np.testing.assert_allclose(ema.decay(EDM_EMA, step, batch), beta, atol=1.2e-7)


RULES = [
  EDM_EMA,
  dict(kind="constant", decay=0.9999),
  dict(kind="power", sigma_rel=0.05),
  dict(kind="power", sigma_rel=0.10),
]


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[3]], ids=str)
def test_first_step_has_no_rate_and_copies_the_weights(rule):
  assert optimizer.learning_rate(ADAM, jnp.int32(0), 512) == 0
  gain = ema.gain(rule, jnp.int32(0), 512)
  old, new = {"w": jnp.array([5.0, jnp.pi])}, {"w": jnp.array([1 / 3, -2.0])}
  np.testing.assert_array_equal(ema.update(old, new, gain)["w"], new["w"])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_average_of_what_stays_is_what_stays(rule):
  w = {"w": jnp.array([1 / 3, -2.7e5, 1e-30])}
  average = w
  for step in (0, 1, 7, 10**6):
    average = ema.update(average, w, ema.gain(rule, step, 512))
  np.testing.assert_array_equal(average["w"], w["w"])


def gain_in_float64(rule: dict, step: int, batch: int) -> float:
  if rule["kind"] == "constant":
    return 1 - rule["decay"]
  if rule["kind"] == "power":
    return 1 - (1 - 1 / (step + 1)) ** (ema.gamma_of(rule["sigma_rel"]) + 1)
  h = min(rule["halflife_images"], rule["rampup_ratio"] * step * batch)
  return 1 - 0.5 ** (batch / h)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("step", [1, 10, 1000, 10**5, 3 * 10**6])
def test_gain_is_exact_in_long_runs(rule, step):
  """To 2e-6: 1 - beta from a float32 beta would be off by 0.3 %."""
  found = jax.jit(lambda t: ema.gain(rule, t, 256))(jnp.int32(step))
  expected = gain_in_float64(rule, step, 256)
  np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_halflife_is_one():
  """After h images at the constant half-life, half of the old value is left."""
  rule = dict(EDM_EMA, rampup_ratio=1e9)
  beta = np.float64(ema.decay(rule, jnp.int32(10), 500))
  np.testing.assert_allclose(beta ** (500_000 / 500), 0.5, rtol=1e-4)


def test_constant_decay_and_unknown_kind():
  assert ema.decay(dict(kind="constant", decay=0.75), jnp.int32(0), 8) == 0.75
  with pytest.raises(UserError, match="'linear': use one of"):
    ema.decay(dict(kind="linear"), jnp.int32(0), 8)


def test_no_ramp():
  config = dict(ADAM, rampup_images=0)
  assert optimizer.learning_rate(config, jnp.int32(0), 8) == np.float32(1e-3)


def test_sanitise():
  g = {"a": jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3e30, -2.5])}
  out = optimizer.sanitise(g)["a"]
  np.testing.assert_array_equal(out, np.float32([0, 1e5, -1e5, 3e30, -2.5]))


def numpy_adam(gradients, rates, w, decay=0.0):
  """Kingma & Ba 2015, Algorithm 1, float64; decay after Loshchilov & Hutter."""
  m = v = 0.0
  for t, (g, rate) in enumerate(zip(gradients, rates), 1):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
    w = w - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)
  return w


@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adamw", 0.1)])
def test_adam_follows_the_equations(name, decay):
  config = dict(
    ADAM, name=name, weight_decay=decay, rampup_images=320, learning_rate=0.1
  )
  batch, gradients = 64, np.random.default_rng(0).normal(size=(8, 3))
  transform = optimizer.make_optimizer(config, batch)
  w = jnp.ones(3)
  state = transform.init(w)
  update = jax.jit(transform.update)
  for g in gradients:
    change, state = update(jnp.float32(g), state, w)
    w = w + change
  rates = 0.1 * np.minimum(np.arange(8) * batch / 320, 1)
  expected = numpy_adam(gradients, rates, np.ones(3), decay)
  np.testing.assert_allclose(w, expected, rtol=2e-6)


def test_non_finite_gradients_do_not_reach_the_moments():
  transform = optimizer.make_optimizer(dict(ADAM, rampup_images=0), 8)
  w = jnp.zeros(2)
  change, state = transform.update(
    jnp.array([jnp.nan, 1.0]), transform.init(w), w
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((change, state)))
  assert change[0] == 0


def test_moments_are_float32():
  transform = optimizer.make_optimizer(ADAM, 8)
  state = jax.eval_shape(transform.init, jnp.zeros(3))
  floats = [x for x in jax.tree.leaves(state) if x.shape == (3,)]
  assert len(floats) == 2 and all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(name="sgd"), "optimizer.name='sgd': use one of"),
    (dict(weight_decay=0.1), "weight_decay=0.1 has no effect on adam"),
  ],
)
def test_wrong_fields_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    optimizer.make_optimizer(dict(ADAM, **fields), 8)
