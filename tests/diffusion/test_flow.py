"""Flow matching: nine pairs against the definition, its times, its twin in EDM.

The data of the closed forms are normal with mean M and standard deviation S, of
which E[y | x] is known at every share of noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10, digits, imagenet256, imagenet512
from diffit_jax.diffusion import edm, flow, kinds
from diffit_jax.errors import UserError
from diffit_jax.generation.options import SamplerOptions

PAIRS = [(p, loss) for p in flow.CLEAN for loss in flow.CLEAN]
M, S = 0.3, 0.5
SHAPE = (5, 2, 2, 2)
RNG = np.random.default_rng(0)
Y, NOISE, ERROR = RNG.normal(size=(3, *SHAPE))
T = np.array([1e-3, 0.2, 0.5, 0.9, 0.999])
T4 = T[:, None, None, None]


def expected_clean(x, t):
  """E[y | x] of normal data: regression of y on x = (1 - t) y + t n."""
  a = 1 - t
  return M + a * S**2 / (a**2 * S**2 + t**2) * (x - a * M)


def raw(prediction, D, x, t):
  """What a network with this prediction gives where it knows D; by (1)."""
  noise = (x - (1 - t) * D) / t
  return {"x": D, "eps": noise, "v": noise - D}[prediction]


def exact_network(prediction, time_scale):
  def network(x, told):
    t = (told / time_scale)[:, None, None, None]
    return raw(prediction, expected_clean(x, t), x, t)

  return network


@pytest.mark.parametrize("prediction", flow.CLEAN)
def test_every_prediction_stands_for_the_same_clean_data(x64, prediction):
  made = flow.Flow(prediction, time_scale=7.0)
  x = (1 - T4) * Y + T4 * NOISE
  D = jax.jit(
    lambda x, t: made.denoise(exact_network(prediction, 7.0), x, t)
  )(x, T)
  np.testing.assert_allclose(D, expected_clean(x, T4), rtol=1e-9)


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_clean_data_are_predicted_at_both_ends(prediction):
  """Pure noise: their mean. No noise: what is there."""
  made, t = flow.Flow(prediction), jnp.array([1.0, 0.0])
  x = jnp.asarray(NOISE[:2], jnp.float32)

  def network(x, told):
    D, noise = expected_clean(x, 1.0), x  # at t = 1; at t = 0 n has mean 0
    at_1 = {"x": D, "v": noise - D}[prediction]
    at_0 = {"x": x, "v": 0 - x}[prediction]
    return jnp.where(told[:, None, None, None] > 0, at_1, at_0)

  D = made.denoise(network, x, t)
  np.testing.assert_allclose(D[0], np.full(SHAPE[1:], M), rtol=1e-6)
  np.testing.assert_array_equal(D[1], x[1])


@pytest.mark.parametrize("prediction, loss", PAIRS)
@pytest.mark.parametrize("clamp", [0.0, 0.05])
def test_the_loss_is_the_error_of_what_it_is_taken_in(
  x64, prediction, loss, clamp
):
  """Prediction and target converted, each divided by no less than clamp."""
  made = flow.Flow(prediction, loss, clamp=clamp)
  x = (1 - T4) * Y + T4 * NOISE
  target = {"x": Y, "eps": NOISE, "v": NOISE - Y}
  F = target[prediction] + ERROR
  losses = made.train_losses(lambda x, told: F, Y, T, NOISE)

  at_least = lambda divisor: np.maximum(divisor, clamp)

  def convert(F):
    """F as what the loss is taken in, straight from (1)."""
    return {
      ("x", "eps"): lambda: (x - (1 - T4) * F) / at_least(T4),
      ("x", "v"): lambda: (x - F) / at_least(T4),
      ("eps", "x"): lambda: (x - T4 * F) / at_least(1 - T4),
      ("eps", "v"): lambda: (F - x) / at_least(1 - T4),
      ("v", "x"): lambda: x - T4 * F,
      ("v", "eps"): lambda: x + (1 - T4) * F,
    }.get((prediction, loss), lambda: F)()

  error = convert(F) - convert(target[prediction])
  expected = (error**2).mean((1, 2, 3))
  np.testing.assert_allclose(losses, expected, rtol=1e-9)
  same = flow.Flow(prediction, prediction)
  plain = same.train_losses(lambda x, told: F, Y, T, NOISE)
  np.testing.assert_allclose(losses, made.loss_weight(T) * plain, rtol=1e-12)


def test_jits_weight_is_the_clamped_one():
  made = flow.make(digits.get_config("objective=jit").diffusion)
  assert (made.prediction, made.loss) == ("x", "v")
  t = np.array([0.01, 0.05, 0.2, 0.99], np.float32)
  expected = 1 / np.maximum(t, 0.05) ** 2
  np.testing.assert_allclose(made.loss_weight(t), expected, rtol=1e-6)


def drawn(**fields):
  keys = jax.random.split(jax.random.key(3), 20_000)
  return np.asarray(jax.jit(flow.Flow(**fields).sample_level)(keys), np.float64)


def test_times_are_drawn_as_the_equations_say():
  """Against the quantiles of (4); 20,000 draws have errors of 0.4 %."""
  share = np.array([0.1, 0.5, 0.9])
  normal = np.array([-1.2815515655, 0, 1.2815515655])
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  found = np.quantile(drawn(), share)
  np.testing.assert_allclose(found, share, atol=0.015)
  found = np.quantile(drawn(shift=3.0), share)
  np.testing.assert_allclose(found, 3 * share / (1 + 2 * share), atol=0.015)
  jit = digits.get_config("objective=jit").diffusion
  t = drawn(time=jit.time, t_mean=jit.t_mean, t_std=jit.t_std)
  np.testing.assert_allclose(
    np.quantile(t, share), sigmoid(0.8 + 0.8 * normal), atol=0.015
  )
  assert np.median(t) == pytest.approx(0.69, abs=0.01)


def test_uniform_times_are_never_at_an_end(monkeypatch):
  for draw, expected in ((0.0, 2.0**-24), (1 - 2.0**-23, 1 - 2.0**-24)):
    monkeypatch.setattr(jax.random, "uniform", lambda *_, d=draw: d)
    t = flow.Flow().sample_level(jax.random.split(jax.random.key(0), 1))
    assert t[0] == np.float32(expected) and 0 < t[0] < 1


@pytest.mark.parametrize(
  "fields",
  [dict(shift=1000.0), dict(shift=1e-3), dict(time="logit_normal", t_std=20.0)],
)
def test_extreme_times_are_never_at_an_end(fields):
  t = drawn(**fields)
  assert 0 < t.min() and t.max() < 1


@pytest.mark.parametrize(
  "config, time_scale",
  [
    (imagenet256, 1000.0),
    (imagenet512, 1000.0),
    (cifar10, 1.0),
    (digits, 1.0),
  ],
)
def test_what_the_network_is_told(config, time_scale):
  made = kinds.make(config.get_config("objective=flow").diffusion)
  told = []
  network = lambda x, time: told.append(time) or x
  made.train_losses(network, jnp.array(Y), jnp.array(T), jnp.array(NOISE))
  made.denoise(network, jnp.array(Y), jnp.array(T))
  for time in told:
    np.testing.assert_allclose(time, time_scale * T, rtol=1e-6)
  assert len(told) == 2


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_is_edms_denoiser_of_the_same_signal_to_noise(x64, prediction):
  """(5), with an EDM network that knows nothing of flows, as their networks."""
  process = edm.make({"sigma_data": S, "P_mean": -1.2, "P_std": 1.2})
  network = lambda x, c_noise: jnp.sin(x) + c_noise[:, None, None, None]
  x, sigma = (1 - T4) * Y + T4 * NOISE, T / (1 - T)
  D = process.denoise(network, x / (1 - T4), sigma)
  as_edm = Y + sigma[:, None, None, None] * NOISE
  np.testing.assert_allclose(x / (1 - T4), as_edm)

  def as_flow(x, t):
    a = (1 - t)[:, None, None, None]
    D = process.denoise(network, x / a, t / (1 - t))
    return raw(prediction, D, x, t[:, None, None, None])

  made = flow.Flow(prediction, time_scale=1.0)
  np.testing.assert_allclose(made.denoise(as_flow, x, T), D, rtol=1e-9)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(prediction="y"), r"prediction='y': use one of \('x', 'eps', 'v'\)"),
    (dict(loss="sigma"), "diffusion.loss='sigma': use one of"),
    (dict(time="cosine"), "diffusion.time='cosine': use one of"),
    (dict(t_mean=0.8), "t_mean=0.8 .* say nothing of time='uniform'"),
    (dict(clamp=1.0), "clamp=1.0 .* cuts the whole path"),
  ],
)
def test_what_there_is_not_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    flow.make(fields)


def test_a_network_with_a_variance_is_refused():
  twice = lambda x, told: jnp.concatenate([x, x], -1)
  with pytest.raises(UserError, match="gives 4 channels for data with 2"):
    flow.Flow().denoise(twice, jnp.zeros(SHAPE), jnp.ones(5))


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"solver": "ddpm"}, "not for a model of diffusion.kind='flow': use "),
    ({"solver": "edm_heun"}, "euler, heun or euler_maruyama for flow"),
    ({"solver_options": "t_max=1.5"}, "t_max=1.5 must be from 0.001 to 1"),
    ({"solver_options": "spacing=trailing"}, "no option 'spacing'"),
    ({"solver_options": "steps=7"}, "steps is no option of a solver"),
    ({"solver": "unipc", "solver_options": "process=adm"}, "process is no opt"),
    ({"solver_options": "shift=1,shift=2"}, "shift stands there twice"),
    ({"solver_options": "shift=-1"}, "shift=-1 must be from 0.001"),
  ],
)
def test_solvers_that_do_not_serve_it_are_refused(changes, message):
  config = imagenet256.get_config("objective=flow,debug")
  for field, value in changes.items():
    config.sampler[field] = value
  with pytest.raises(UserError, match=message):
    SamplerOptions.from_config(config)


def test_a_network_of_noise_starts_below_pure_noise():
  config = imagenet256.get_config("objective=flow,debug")
  config.diffusion.prediction = "eps"
  with pytest.raises(UserError, match="nothing of the data at t = 1"):
    SamplerOptions.from_config(config)
  config.sampler.solver_options = "t_max=0.99999999"  # 1 in float32
  with pytest.raises(UserError, match="nothing of the data at t = 1"):
    SamplerOptions.from_config(config)
  config.sampler.solver_options = "t_max=0.999"
  SamplerOptions.from_config(config)
