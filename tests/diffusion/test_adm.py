"""ADM's tables, respacing and loss: Bayes' rule, goldens, float64 longhand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffit_jax.diffusion import adm, bound, spacing
from diffit_jax.errors import UserError
from slow import slow

WHOLE = adm.make_schedule()
HALF_LOG_SNR = np.log(WHOLE.alphas_cumprod / (1 - WHOLE.alphas_cumprod)) / 2


def row(*values, dtype=jnp.float32):
  """One sample of height and width 1."""
  return jnp.array(values, dtype).reshape(1, 1, 1, -1)


# --- tables -----------------------------------------------------------------


@pytest.mark.parametrize("respacing", [None, 50, "ddim25", "logsnr_exact30"])
def test_posterior_is_bayes_rule(respacing):
  """q(x_{t-1} | x_t, x_0) from q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
  s = adm.make_schedule(1000, respacing)
  beta, previous = s.betas[1:], s.alphas_cumprod_prev[1:]
  precision = (1 - beta) / beta + 1 / (1 - previous)
  np.testing.assert_allclose(s.posterior_variance[1:], 1 / precision, rtol=1e-9)
  np.testing.assert_allclose(
    s.c1[1:], np.sqrt(previous) / (1 - previous) / precision, rtol=1e-9
  )
  np.testing.assert_allclose(
    s.c2[1:], np.sqrt(1 - beta) / beta / precision, rtol=1e-9
  )
  np.testing.assert_allclose(s.c1[0], 1, rtol=1e-11)
  assert s.c2[0] == 0 and s.posterior_variance[0] == 0


def test_golden_tables():  # ADM tables in GOLDENS.md
  assert all(
    getattr(WHOLE, name).dtype == np.float64
    for name in ("betas", "alphas_cumprod", "c1", "c2", "log_betas")
  )
  # The values are listed to 11 digits or more.
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-11)
  close(
    WHOLE.betas[[0, 1, 500, 999]],
    [1e-4, 1.1991991991992e-4, 0.01005995995996, 0.02],
  )
  close(
    WHOLE.alphas_cumprod[[0, 1, 249, 500, 999]],
    [
      0.9999,
      0.9997800920720721,
      0.5240853738253606,
      0.07779665836502389,
      4.035829765375676e-05,
    ],
  )
  close(WHOLE.posterior_variance[1], 5.4531876613022e-05)
  close(
    WHOLE.posterior_log_variance[[0, 1, 500, 999]],
    [-9.81672513529567, -9.81672513529567, -4.600049739985, -3.912023829100],
  )
  close(
    WHOLE.c1[[1, 500, 999]],
    [0.54529149951, 0.00305805707563, 1.2835148717e-4],
  )
  close(WHOLE.c2[[1, 500]], [0.45470849899, 0.994104350757])
  close(WHOLE.log_betas[500], -4.599192094442)


# --- respacing --------------------------------------------------------------


@pytest.mark.parametrize("respacing", [1000, "1000", "ddim1000"])
def test_respacing_to_all_steps_changes_nothing(respacing):
  s = adm.make_schedule(1000, respacing)
  np.testing.assert_array_equal(s.timesteps, np.arange(1000))
  for name in ("betas", "c1", "c2", "posterior_log_variance"):
    # 1 - abar / abar' keeps 12 digits of a beta of 1e-4.
    np.testing.assert_allclose(
      getattr(s, name), getattr(WHOLE, name), rtol=2e-12
    )


@pytest.mark.parametrize("n", [1, 2, 10, 50, 999, 1000])
@pytest.mark.parametrize("name", [n for n in spacing.SPACINGS if n != "ddim"])
def test_respacing_keeps_the_noise_levels_it_keeps(name, n):
  s = adm.make_schedule(1000, f"{name}{n}".replace("uniform", ""))
  assert s.num_steps == n == len(np.unique(s.timesteps))
  assert s.timesteps[-1] == 999 and np.all(np.diff(s.timesteps) > 0)
  if n > 1 and name != "trailing" or n == 1000:
    assert s.timesteps[0] == 0
  if name == "logsnr_exact":
    abar = np.interp(s.timesteps, np.arange(1000), np.log(WHOLE.alphas_cumprod))
    np.testing.assert_allclose(np.log(s.alphas_cumprod), abar, rtol=1e-9)
  else:
    assert s.timesteps.dtype.kind == "i"
    np.testing.assert_allclose(
      s.alphas_cumprod, WHOLE.alphas_cumprod[s.timesteps], rtol=1e-11
    )


def test_released_indices():  # respacing in GOLDENS.md
  t = adm.make_schedule(1000, 250).timesteps
  np.testing.assert_array_equal(t, adm.make_schedule(1000, "250").timesteps)
  np.testing.assert_array_equal(t, np.rint(np.arange(250) * 999 / 249))
  gaps = np.diff(t)
  np.testing.assert_array_equal(t[:-1][gaps == 5], [164, 497, 830])
  assert set(gaps) == {4, 5} and t.sum() == 124_875
  ends = lambda n: adm.make_schedule(1000, n).timesteps[np.r_[:5, -5:0]]
  np.testing.assert_array_equal(
    ends(50), [0, 20, 41, 61, 82, 917, 938, 958, 979, 999]
  )
  np.testing.assert_array_equal(
    ends("25"), [0, 42, 83, 125, 166, 832, 874, 916, 957, 999]
  )
  np.testing.assert_array_equal(
    adm.make_schedule(1000, "ddim250").timesteps, np.arange(0, 1000, 4)
  )
  # The smallest stride: 334 = ceil(1000 / 3), 20 comes of 50, 51 and 52.
  np.testing.assert_array_equal(
    adm.make_schedule(1000, "ddim20").timesteps, np.arange(0, 1000, 50)
  )


def test_released_tables():  # respacing in GOLDENS.md
  s = adm.make_schedule(1000, 250)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11)
  close(
    s.betas[[0, 1, 2, 125, 249]],
    [
      1e-4,
      5.990655644756e-4,
      9.176029928173e-4,
      0.04929790363417974,
      0.07751934499235,
    ],
  )
  close(
    s.posterior_log_variance[[0, 1, 125, 249]],
    [-9.364628159803, -9.364628159803, -3.014162224786, -2.557231152561],
  )
  close([s.c1[125], s.c2[125]], [0.01511196081568, 0.97086702881478])
  assert s.timesteps[125] == 502


def test_spacings_by_level_are_even_in_it():
  t = adm.make_schedule(1000, "logsnr_exact21").timesteps
  gaps = np.diff(np.interp(t, np.arange(1000), HALF_LOG_SNR))
  assert gaps.std() / abs(gaps.mean()) < 0.02  # lambda is no line between steps
  whole = adm.make_schedule(1000, "logsnr21").timesteps
  np.testing.assert_allclose(whole[6:], t[6:], atol=0.5)
  ratio = lambda t: np.exp(-np.interp(t, np.arange(1000), HALF_LOG_SNR) / 7)
  gaps = np.diff(ratio(adm.make_schedule(1000, "karras10").timesteps[3:]))
  assert gaps.std() / gaps.mean() < 0.02
  t = adm.make_schedule(1000, "trailing4").timesteps
  np.testing.assert_array_equal(t, [249, 499, 749, 999])


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(num_steps=0), "num_steps=0 must be a whole number above 20"),
    (dict(num_steps=True), "num_steps=True must be"),
    (dict(respacing=0), "respacing=0: .* from 1 to 1000"),
    (dict(respacing="-3"), "from 1 to 1000"),
    (dict(respacing=1001), "respacing=1001: .* from 1 to 1000"),
    (dict(respacing="ddim1001"), "from 1 to 1000"),
    (dict(respacing="ddim300"), "nearest are 'ddim250' and 'ddim334'"),
    (dict(respacing="ddim1"), "nearest are 'ddim2' and 'ddim2'"),
    (dict(respacing="plms20"), "'plms20' is not understood; .*'ddimN'"),
    (dict(respacing=2.5), "respacing=2.5 is not understood"),
    (dict(respacing=True), "respacing=True is not understood"),
    (dict(respacing=""), "respacing='' is not understood"),
  ],
)
def test_schedules_that_cannot_be_had(kwargs, message):
  with pytest.raises(UserError, match=message):
    adm.make_schedule(**kwargs)


# --- forward process --------------------------------------------------------


def test_noise_can_be_taken_out_again():
  t = jnp.array([0, 1, 500, 999])
  x0, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2))
  x_t = jax.jit(WHOLE.q_sample)(x0, t, noise)
  # x_0 comes of numbers up to 1 / sqrt(abar) times as large.
  tolerance = 4e-7 / np.sqrt(WHOLE.alphas_cumprod[t])
  column = lambda table: np.float32(table[t])[:, None, None, None]
  found = column(WHOLE.x_to_x0) * x_t - column(WHOLE.eps_to_x0) * noise
  assert np.all(np.abs(found - x0).max(axis=(1, 2, 3)) < tolerance)
  # Facts 4.3.
  np.testing.assert_allclose(
    WHOLE.q_sample(row(0.8, -0.6), jnp.array([500]), row(0.5, -1)).ravel(),
    [0.7032935132, -1.1276665031],
    rtol=2e-7,
  )
  np.testing.assert_allclose(
    WHOLE.q_sample(row(0.1, 1.2), jnp.array([0]), row(0.25, 2)).ravel(),
    [0.102495, 1.2199399985],
    rtol=2e-7,
  )


def test_step_beyond_the_schedule_is_not_a_number():
  x_t = WHOLE.q_sample(row(1.0), jnp.array([1000]), row(1.0))
  assert np.isnan(x_t).all()


def test_the_posteriors_mean_is_x0_at_the_first_step():
  """In float32, to the bit; `test_golden_tables` has the other end."""
  assert np.float32(WHOLE.c1[0]) == 1 and WHOLE.c2[0] == 0


def test_variance_lies_between_posterior_and_beta():
  v = row(-1, 1, 0, 3)  # v is not bounded
  low, high = WHOLE.posterior_log_variance[500], WHOLE.log_betas[500]
  expected = np.array([low, high, (low + high) / 2, 2 * high - low])
  np.testing.assert_allclose(
    adm.interpolate_log_variance(v, high, low).ravel(), expected, rtol=2e-7
  )
  ratio = WHOLE.log_ratio(v, jnp.array([500])).ravel()
  np.testing.assert_allclose(ratio, expected - low, rtol=2e-7)


def test_training_steps_are_uniform_and_of_their_keys_alone():
  keys = jax.random.split(jax.random.key(0), 20_000)
  t = WHOLE.sample_level(keys)
  assert t.dtype == jnp.int32 and t.min() == 0 and t.max() == 999
  # 20 bins of 1000 expected; p-value of a fixed seed.
  assert stats.chisquare(np.bincount(t // 50)).pvalue > 0.01
  np.testing.assert_array_equal(WHOLE.sample_level(keys[7:9]), t[7:9])


# --- loss -------------------------------------------------------------------


@pytest.mark.parametrize(
  "x0, eps, t, output, mse, vb",
  [  # ADM loss in GOLDENS.md
    ((0.8, -0.6), (0.5, -1), 500, (0.4, -0.7, 0.2, -0.4), 0.05, 3.977315e-4),
    ((0.1, 1.2), (0.25, 2), 0, (0.3, 1.5, -1, 0.6), 0.12625, 0.7902432),
  ],
)
def test_golden_losses(x0, eps, t, output, mse, vb):
  losses = jax.jit(WHOLE.losses)(
    row(*output), row(*x0), jnp.array([t]), row(*eps)
  )
  for value in losses.values():
    assert value.shape == (1,) and value.dtype == jnp.float32
  np.testing.assert_allclose(losses["mse"], mse, rtol=3e-7)
  np.testing.assert_allclose(losses["vb"], vb, rtol=5e-7)
  np.testing.assert_allclose(losses["loss"], mse + vb, rtol=3e-7)


def longhand(output, x0, t, eps):
  """Facts 4.1 and 4.3 for one sample, in float64, by way of x_t and means."""
  output, x0, eps = (np.asarray(a, np.float64) for a in (output, x0, eps))
  beta = np.linspace(1e-4, 2e-2, 1000)
  abar = np.cumprod(1 - beta)
  abar_prev = np.append(1, abar[:-1])
  variance = beta * (1 - abar_prev) / (1 - abar)
  logclip = np.log(np.append(variance[1], variance[1:]))[t]
  eps_hat, v = np.split(output, 2, axis=-1)
  c1 = beta[t] * np.sqrt(abar_prev[t]) / (1 - abar[t])
  c2 = (1 - abar_prev[t]) * np.sqrt(1 - beta[t]) / (1 - abar[t])
  x_t = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * eps
  x0_hat = x_t / np.sqrt(abar[t]) - np.sqrt(1 / abar[t] - 1) * eps_hat
  m1, m2 = c1 * x0 + c2 * x_t, c1 * x0_hat + c2 * x_t
  l1, f = logclip, (v + 1) / 2
  l2 = f * np.log(beta[t]) + (1 - f) * logclip
  if t:
    nats = (-1 + l2 - l1 + np.exp(l1 - l2) + (m1 - m2) ** 2 * np.exp(-l2)) / 2
  else:
    cdf = lambda x: (
      (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    )
    s = np.exp(-l2 / 2)
    high, low = cdf(s * (x0 - m2 + 1 / 255)), cdf(s * (x0 - m2 - 1 / 255))
    p = np.where(x0 < -0.999, high, np.where(x0 > 0.999, 1 - low, high - low))
    nats = -np.log(np.maximum(p, 1e-12))
  return np.mean((eps - eps_hat) ** 2), np.mean(nats) / np.log(2)


T = np.array([0, 0, 1, 2, 10, 500, 998, 999])


def batch(dtype=jnp.float32):
  """Latents from -3 to 3, so that all three kinds of bins occur."""
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, len(T), 4, 4, 2))
  eps = noise + 0.3 * rng.normal(size=noise.shape)
  output = np.concatenate([eps, rng.uniform(-1.2, 1.2, noise.shape)], axis=-1)
  return [jnp.asarray(a, dtype) for a in (output, x0, noise)]


def test_losses_in_float64_are_the_longhand_ones(x64):
  output, x0, noise = batch(jnp.float64)
  losses = jax.jit(WHOLE.losses)(output, x0, T, noise)
  expected = np.transpose(
    [longhand(*sample) for sample in zip(output, x0, T, noise)]
  )
  np.testing.assert_allclose(losses["mse"], expected[0], rtol=1e-13)
  # By way of x_t the longhand loses digits; for a mass near 1e-12 as well.
  np.testing.assert_allclose(losses["vb"], expected[1], rtol=1e-8)


def test_losses_in_float32_keep_their_digits():
  output, x0, noise = batch()
  losses = jax.jit(WHOLE.losses)(output, x0, T, noise)
  expected = np.transpose(
    [longhand(*sample) for sample in zip(output, x0, T, noise)]
  )
  np.testing.assert_allclose(losses["mse"], expected[0], rtol=1e-6)
  np.testing.assert_allclose(losses["vb"], expected[1], rtol=2e-6)


def std_at_0(v):
  low, high = WHOLE.posterior_log_variance[0], np.log(1e-4)
  return jnp.exp((low + (v + 1) / 2 * (high - low)) / 2)


def nats_at_0(v, x0, eps_error):
  """-ln P of (8) in the dtype of its arguments, from a difference of two tails.

  They are those of the side where the bin lies: small numbers themselves, whose
  difference keeps its digits.
  """
  deviation = np.sqrt(1 / 0.9999 - 1) * eps_error  # x_0 less its mean, by (10)
  scale = 1 / std_at_0(v)
  tail = lambda x: 1 / (1 + jnp.exp(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)))
  middle, half = jnp.abs(scale * deviation), scale / 255
  mass = tail(middle - half) - tail(middle + half)
  mass = jnp.where(x0 < -0.999, tail(-scale * (deviation + 1 / 255)), mass)
  mass = jnp.where(x0 > 0.999, tail(scale * (deviation - 1 / 255)), mass)
  return -jnp.log(jnp.maximum(mass, 1e-12))


@pytest.mark.parametrize("wrap", [jax.jit, slow(lambda function: function)])
def test_bound_at_0_keeps_its_digits_in_the_tails(wrap):
  """Log-masses down to -27, beside which 1e-12 would be -27.63, and open bins.

  Measured: bound 1.5e-7, gradient 2.3e-7. The difference of two distribution
  functions in float32 is off by 15 % and 80 % here.
  """
  rng = np.random.default_rng(17)
  shape = (2, 16, 16, 4)
  x0, noise = np.float32(rng.normal(size=(2, *shape)))
  v = np.float32(rng.uniform(-1, 1, shape))
  stds = np.float32(rng.uniform(-6.75, 6.75, shape))
  eps = noise + stds * std_at_0(v) / np.sqrt(1 / 0.9999 - 1)

  def bound(v):
    output = jnp.concatenate([eps, v], axis=-1)
    return WHOLE.losses(output, x0, np.zeros(2, int), noise)["vb"]

  with jax.enable_x64(True):
    wide = [np.float64(v), x0, np.float64(eps) - noise]
    nats = np.asarray(jax.jit(nats_at_0)(*wide))
    summed = lambda v: nats_at_0(v, *wide[1:]).sum() / np.log(2) / 1024
    gradient = np.asarray(jax.jit(jax.grad(summed))(wide[0]))
  assert 27 < nats[nats < 27.631].max() < 27.6  # none near the clamp
  expected = nats.mean(axis=(1, 2, 3)) / np.log(2)
  found = wrap(bound)(v)
  np.testing.assert_allclose(found, expected, rtol=3e-7)
  found = wrap(jax.grad(lambda v: bound(v).sum()))(v)
  off = np.linalg.norm(found - gradient) / np.linalg.norm(gradient)
  assert off < 2e-6


@pytest.mark.parametrize("x0, num_empty", [(0.5, 6), (-1.0, 3), (1.0, 3)])
def test_bound_far_out_is_the_clamp_and_its_gradient_a_number(x0, num_empty):
  """Bins at -1 and 1 are open: far on their own side they hold all mass."""
  stds = np.float32([-1e9, -1e4, -50, 50, 1e4, 1e9]) * (1 if x0 < 0 else -1)
  mass = lambda deviation, log_variance: bound.discretized_log_likelihood(
    jnp.full(6, x0), deviation, log_variance
  )
  args = (jnp.exp(-4.75) * stds, jnp.full(6, -9.5))
  expected = [np.log(1e-12)] * num_empty + [0] * (6 - num_empty)
  np.testing.assert_allclose(jax.jit(mass)(*args), expected, rtol=1e-7)
  gradients = jax.jit(jax.grad(lambda *a: mass(*a).sum(), (0, 1)))(*args)
  np.testing.assert_array_equal(gradients, 0)


def test_bound_keeps_its_digits_where_both_variances_nearly_agree():
  """ln beta less ln of (4) is 8.6e-4 at t = 500, and 8e-7 at the end.

  Measured: bound 5e-7, of which the table 2e-7, gradient 2e-7. As differences
  of float32 logarithms they are off by 5e-5 and 15 %.
  """
  t = np.array([1, 100, 500, 900, 999])
  rng = np.random.default_rng(3)
  shape = (len(t), 16, 16, 4)
  x0, noise = np.float32(rng.normal(size=(2, *shape)))
  v = np.float32(rng.uniform(-1.2, 1.2, shape))
  eps = noise + np.float32(0.01 * rng.normal(size=shape))

  beta = np.linspace(1e-4, 2e-2, 1000)
  abar = np.cumprod(1 - beta)
  column = lambda x: x[:, None, None, None]
  log_gap = column(np.log((1 - abar[t]) / (1 - abar[t - 1])))
  log_least = column(np.log(beta[t])) - log_gap
  weight = column((beta / (1 - abar) * np.sqrt(abar / (1 - beta)))[t])
  weight *= column(np.sqrt(1 / abar[t] - 1))
  square = (weight * (np.float64(eps) - noise)) ** 2

  ratio = (np.float64(v) + 1) / 2 * log_gap  # l2 - l1
  share = square * np.exp(-log_least - ratio)
  mean = lambda x: x.mean(axis=(1, 2, 3))
  expected = mean(ratio + np.expm1(-ratio) + share) / 2 / np.log(2)
  gradient = log_gap / 4 * (-np.expm1(-ratio) - share) / np.log(2) / 1024

  def bound(v):
    output = jnp.concatenate([eps, v], axis=-1)
    return WHOLE.losses(output, x0, t, noise)["vb"]

  np.testing.assert_allclose(jax.jit(bound)(v), expected, rtol=1e-6)
  found = jax.jit(jax.grad(lambda v: bound(v).sum()))(v)
  norm = lambda x: np.sqrt(mean(np.square(x)))
  np.testing.assert_array_less(norm(found - gradient) / norm(gradient), 2e-6)


def test_bound_trains_the_variance_alone():
  output, x0, noise = batch()
  gradients = jax.jit(
    jax.jacrev(lambda o: jax.tree.map(jnp.sum, WHOLE.losses(o, x0, T, noise)))
  )(output)
  gradient = lambda name: np.split(gradients[name], 2, axis=-1)
  vb_eps, vb_v = gradient("vb")
  mse_eps, mse_v = gradient("mse")
  np.testing.assert_array_equal(vb_eps, 0)
  np.testing.assert_array_equal(mse_v, 0)
  assert np.all(np.abs(vb_v).max(axis=(1, 2, 3)) > 0)
  np.testing.assert_allclose(
    mse_eps, 2 * (output[..., :2] - noise) / 32, rtol=2e-6, atol=1e-8
  )
  loss_eps, loss_v = gradient("loss")
  np.testing.assert_array_equal(loss_eps, mse_eps)
  np.testing.assert_array_equal(loss_v, vb_v)


def test_perfect_network_has_no_loss():
  _, x0, noise = batch()
  perfect = jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)
  losses = WHOLE.losses(perfect, x0, T, noise)
  np.testing.assert_array_equal(losses["mse"], 0)
  np.testing.assert_allclose(losses["vb"][2:], 0, atol=1e-6)


def test_network_without_variance():
  output, x0, noise = batch()
  losses = WHOLE.losses(output[..., :2], x0, T, noise)
  assert sorted(losses) == ["loss", "mse"]
  np.testing.assert_array_equal(losses["loss"], losses["mse"])
  with pytest.raises(UserError, match="3 channels for data with 2: .* 2 .* 4"):
    WHOLE.losses(output[..., :3], x0, T, noise)


def test_bfloat16_network_and_data_are_weighed_in_float32():
  output, x0, noise = batch(jnp.bfloat16)
  losses = jax.jit(WHOLE.losses)(output, x0, T, noise)
  again = WHOLE.losses(*(a.astype(jnp.float32) for a in (output, x0)), T, noise)
  for name in losses:
    assert losses[name].dtype == jnp.float32
    np.testing.assert_allclose(losses[name], again[name], rtol=2e-7)
  assert WHOLE.q_sample(x0, T, noise).dtype == jnp.float32


def test_split_output():
  output = jnp.arange(8.0).reshape(1, 1, 1, 8)
  eps, v = adm.split_output(output, 4)
  np.testing.assert_array_equal(eps.ravel(), [0, 1, 2, 3])
  np.testing.assert_array_equal(v.ravel(), [4, 5, 6, 7])
  eps, v = adm.split_output(output, 8)
  assert v is None and eps is output


@pytest.mark.parametrize(
  "m1, l1, m2, l2", [(0, 0, 0, 0), (0.3, -1, -0.5, 0.4), (2, 1.5, 1, -0.3)]
)
def test_kl_is_the_integral(x64, m1, l1, m2, l2):
  p, q = stats.norm(m1, np.exp(l1 / 2)), stats.norm(m2, np.exp(l2 / 2))
  expected, _ = integrate.quad(
    lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -30, 30
  )
  np.testing.assert_allclose(
    bound.normal_kl(jnp.float64(m1 - m2), l1, l2), expected, atol=1e-9
  )


def test_bins_of_all_pixel_values_hold_all_of_the_mass(x64):
  x0 = np.arange(256) / 127.5 - 1
  for mean, log_variance in ((0.1, -3.0), (-0.98, -5.0), (1.4, -2.0)):
    log_p = bound.discretized_log_likelihood(x0, x0 - mean, log_variance)
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, atol=1e-9)
    # The tanh is within 3e-4 of the normal distribution function.
    true = stats.norm(mean, np.exp(log_variance / 2)).cdf(x0 + 1 / 255)
    true[-1] = 1
    np.testing.assert_allclose(np.cumsum(np.exp(log_p)), true, atol=4e-4)
