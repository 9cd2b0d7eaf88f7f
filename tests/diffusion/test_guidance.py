"""The guidance rule: limits, golden tables, and its batching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.diffusion import guidance
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.errors import UserError

SHAPE = (3, 2, 2, 8)
COND, UNCOND = jax.random.normal(jax.random.key(0), (2, *SHAPE))
T = jnp.array([0, 400, 999])


@pytest.mark.parametrize("schedule", guidance.SCHEDULES)
@pytest.mark.parametrize("channels", ["all", 3])
def test_scale_one_is_the_conditional_bit_for_bit(schedule, channels):
  out = guidance.apply_cfg(
    COND, UNCOND, T, scale=1.0, schedule=schedule, channels=channels
  )
  np.testing.assert_array_equal(out, COND)


def test_scale_zero_is_the_unconditional_bit_for_bit():
  out = guidance.apply_cfg(COND, UNCOND, None, scale=0.0)
  np.testing.assert_array_equal(out, UNCOND)


def test_constant_scale_extrapolates():
  out = jax.jit(lambda s: guidance.apply_cfg(COND, UNCOND, None, scale=s))(1.5)
  expected = np.float64(UNCOND) + 1.5 * (np.float64(COND) - UNCOND)
  np.testing.assert_allclose(out, expected, atol=2e-6)  # values up to 8


def test_later_channels_stay_conditional():
  out = guidance.apply_cfg(
    COND, UNCOND, T, scale=4.4, schedule="power_cosine", channels=3
  )
  whole = guidance.apply_cfg(
    COND, UNCOND, T, scale=4.4, schedule="power_cosine"
  )
  np.testing.assert_array_equal(out[..., :3], whole[..., :3])
  np.testing.assert_array_equal(out[..., 3:], COND[..., 3:])
  # Each sample has the scale of its own t; at t = 999 it is 1.
  np.testing.assert_allclose(out[2], COND[2], atol=1e-6)
  assert np.abs(out[0, ..., :3] - COND[0, ..., :3]).max() > 1


def test_rule_is_float32_and_the_result_has_the_dtype_of_the_prediction():
  cond, uncond = (jnp.full((1, 1, 1, 1), v, jnp.bfloat16) for v in (512, 3))
  out = guidance.apply_cfg(cond, uncond, None, scale=0.5)
  # 3 + 509 / 2 = 257.5, in bfloat16 258; had 509 been rounded to 508: 256.
  assert out.dtype == jnp.bfloat16 and out.item() == 258
  with jax.enable_x64(True):
    cond, uncond = jnp.full((2, 1, 1, 1, 1), 1.0).at[1].set(0.5)
    out = guidance.apply_cfg(cond, uncond, None, scale=3.0)
    assert out.dtype == jnp.float64 and out.item() == 2.0


# guidance in GOLDENS.md: (1 - cos(pi (1 - t/1000)^4)) / 2
BUMP = {
  0: 1,
  1: 0.99996064037,
  4: 0.99937601219,
  100: 0.73549054445,
  250: 0.22733750579,
  500: 0.00960735980,
  750: 3.7649080e-5,
  900: 2.467401e-8,
}


@pytest.mark.parametrize("t, bump", BUMP.items())
def test_power_cosine_shape(t, bump):
  scale = 1e6  # so large that the 1 in s = 1 + scale bump hides no digits
  rule = Guidance(scale + 1, schedule="power_cosine")
  s = rule.scale_at(jnp.array([t]))
  np.testing.assert_allclose(s, [1 + scale * bump], rtol=1e-6)


@pytest.mark.parametrize(
  "scale, expected",
  [
    (4.4, [4.4, 3.5006678511, 1.7729475197, 1.0326650233, 1.0001280069, 1]),
    (4.6, [4.6, 3.6477659600, 1.8184150208, 1.0345864953, 1.0001355367, 1]),
  ],
)
def test_power_cosine_table(scale, expected):
  t = jnp.array([0, 100, 250, 500, 750, 999])
  rule = Guidance(scale, schedule="power_cosine", power=4.0)
  s = jax.jit(rule.scale_at)(t)
  np.testing.assert_allclose(s, expected, rtol=3e-7)  # float32


def test_constant_scale_needs_no_timestep():
  assert Guidance(1.49).scale_at(None) == np.float32(1.49)
  assert Guidance(1.49).scale_at(T).shape == (3,)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(scale=2.0, schedule="cosine"), "constant, power_cosine"),
    (dict(scale=2.0, schedule="power_cosine", t=None), "timestep"),
    (dict(scale=2.0, channels=9), "channels=9.* 8 channels"),
    (dict(scale=2.0, channels="three"), "channels='three'"),
    (dict(scale=1.0, schedule="cosine"), "constant, power_cosine"),
  ],
)
def test_mistakes(kwargs, message):
  t = kwargs.pop("t", T)
  with pytest.raises(UserError, match=message):
    guidance.apply_cfg(COND, UNCOND, t, **kwargs)


def network(x, level, labels):
  """Any function that treats rows apart and sees all three inputs."""
  return x * level[:, None, None, None] + labels[:, None, None, None]


def test_guided_equals_two_runs():
  x, level = COND, jnp.array([1.0, 2.0, 3.0])
  labels = jnp.array([4, 0, 7])
  rows = []

  def counting(x, level, labels):
    rows.append(len(x))
    return network(x, level, labels)

  cfg = dict(scale=2.5, channels=3)
  out = Guidance(**cfg).denoiser(counting, labels, 10)(x, level)
  expected = guidance.apply_cfg(
    network(x, level, labels),
    network(x, level, jnp.full(3, 10)),
    level,
    **cfg,
  )
  np.testing.assert_array_equal(out, expected)
  assert rows == [6]


def test_guided_runs_single_rows_at_scale_one():
  x, level, labels = COND, jnp.ones(3), jnp.array([1, 2, 3])
  out = Guidance(1).denoiser(network, labels, 10)(x, level)
  np.testing.assert_array_equal(out, network(x, level, labels))
  unconditional = lambda x, level, labels: x if labels is None else None
  out = Guidance(1.0).denoiser(unconditional, None, 0)(x, level)
  np.testing.assert_array_equal(out, x)


def test_guided_without_labels():
  with pytest.raises(UserError, match="scale=2.0 needs labels"):
    Guidance(2.0).denoiser(network, None, 10)


# --- an interval of noise levels, and what may be skipped --------------------


@pytest.mark.parametrize("schedule", guidance.SCHEDULES)
def test_interval_has_its_ends_and_no_more(schedule):
  t = jnp.array([99, 100, 400, 700, 701])
  cfg = dict(scale=3.0, schedule=schedule)
  s = Guidance(**cfg, interval=(100, 700)).scale_at(t)
  np.testing.assert_array_equal(s[jnp.array([0, 4])], 1)
  np.testing.assert_array_equal(s[1:4], Guidance(**cfg).scale_at(t)[1:4])
  assert s.dtype == jnp.float32 and np.all(s[1:4] > 1)


def test_interval_of_sigmas():
  rule = Guidance(2.0, interval=(0.28, 2.9))
  s = rule.scale_at(jnp.array([80.0, 2.0, 0.01]))
  np.testing.assert_array_equal(s, [1, 2, 1])


def test_prediction_outside_of_the_interval_is_the_conditional():
  out = guidance.apply_cfg(COND, UNCOND, T, scale=3.0, interval=(100, 700))
  whole = guidance.apply_cfg(COND, UNCOND, T, scale=3.0)
  np.testing.assert_array_equal(out[1], whole[1])
  np.testing.assert_allclose(out[::2], COND[::2], atol=5e-7)  # u + (c - u)


@pytest.mark.parametrize("schedule", guidance.SCHEDULES)
@pytest.mark.parametrize("interval", [None, (100, 700)])
@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.5])
def test_skippable_is_where_the_scale_is_one(schedule, interval, tolerance):
  cfg = dict(scale=4.4, schedule=schedule, interval=interval)
  t = np.arange(1000)
  skipped = Guidance(**cfg, tolerance=tolerance).skippable(t)
  s = np.float64(Guidance(**cfg).scale_at(t))
  # A step or two may fall either way: jax's float32 and numpy's float64.
  expected = np.abs(s - 1) <= tolerance
  assert np.count_nonzero(skipped != expected) <= 2
  assert skipped.any() == (schedule != "constant" or interval is not None)


def test_skippable_is_known_while_tracing():
  @jax.jit
  def run(x):
    rule = Guidance(2.0, interval=(0, 500))
    skipped = rule.skippable(np.array([900.0, 10.0]))
    return x if list(skipped) == [True, False] else None

  assert run(1.0) == 1.0
  assert Guidance(1.0).skippable(np.arange(3)).all()


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(interval=(5, 2)), r"interval=\(5, 2\) must be \(low, high\)"),
    (dict(interval=(1, 2, 3)), r"must be \(low, high\)"),
    (dict(tolerance=-1.0), "tolerance=-1.0 must not be negative"),
    (dict(schedule="cosine"), "constant, power_cosine"),
  ],
)
def test_mistakes_of_a_rule(kwargs, message):
  with pytest.raises(UserError, match=message):
    Guidance(**{"scale": 2.0, **kwargs})


def test_interval_needs_the_level():
  with pytest.raises(UserError, match="needs the timestep"):
    Guidance(2.0, interval=(0, 1)).scale_at(None)


class TestGuide:
  """Autoguidance, (4) of the module."""

  GUIDE = jax.random.normal(jax.random.key(1), SHAPE)

  @pytest.mark.parametrize("scale", [1.0, 3.0])
  @pytest.mark.parametrize("w", [0.0, 0.5, 2.5])
  def test_the_equation(self, scale, w):
    rule = Guidance(scale, "power_cosine", guide_scale=w, channels=3)
    out = rule.apply(COND, UNCOND, T, self.GUIDE)
    c, u, g = (np.float64(x[..., :3]) for x in (COND, UNCOND, self.GUIDE))
    s = np.float64(rule.scale_at(T))[:, None, None, None]
    expected = c + (s - 1) * (c - u) + (w - 1) * (c - g)
    np.testing.assert_allclose(out[..., :3], expected, atol=1e-5)
    np.testing.assert_array_equal(out[..., 3:], COND[..., 3:])

  def test_limits_bit_for_bit(self):
    """Led by itself nothing changes; a weight of 0 is the guide."""
    rule = Guidance(guide_scale=2.5)
    np.testing.assert_array_equal(rule.apply(COND, None, T, COND), COND)
    rule = Guidance(guide_scale=0.0)
    out = rule.apply(COND, None, T, self.GUIDE)
    np.testing.assert_array_equal(out, self.GUIDE)

  def test_who_is_evaluated_and_with_what(self):
    """The guide with the label alone; nothing that does not matter."""
    seen = {"main": [], "guide": []}

    def network(name):
      def run(x, level, labels):
        seen[name].append((x.shape[0], labels.tolist()))
        return x + labels[:, None, None, None]

      return run

    labels = jnp.array([1, 2, 3])
    x, main, guide = COND, network("main"), network("guide")
    for scale, w, rows, is_led in (
      (1.0, 1.0, 3, False),
      (2.0, 1.0, 6, False),
      (1.0, 2.0, 3, True),
      (2.0, 2.0, 6, True),
    ):
      rule = Guidance(scale, guide_scale=w)
      rule.denoiser(main, labels, 10, guide)(x, T)
      assert seen["main"].pop()[0] == rows
      assert seen["guide"] == [(3, [1, 2, 3])] * is_led
      seen["guide"].clear()
    with pytest.raises(UserError, match="guide_scale=2.0 needs a guide"):
      Guidance(guide_scale=2.0).denoiser(main, labels, 10)

  def test_a_network_without_labels_is_led_too(self):
    rule = Guidance(guide_scale=2.0)
    denoiser = rule.denoiser(
      lambda x, level, labels: x, None, 0, lambda x, level, labels: x / 2
    )
    np.testing.assert_allclose(denoiser(COND, T), 1.5 * COND, rtol=1e-6)

  def test_the_guided_density_of_mixtures_is_known(self):
    """w = 2 leads by p^2 / q: of normals of one width, again a mixture.

    With p a mixture of N(m_i, v) and q = N(0, q), p^2 has the means (m_i +
    m_j)/2, the variance v/2 and weights that overlap e^(-(m_i - m_j)^2 / 4v);
    q takes 1/q from the precision. Every D is x + sigma^2 score.
    """
    means, weights, v0, q0 = np.array([-1.0, 0.7]), np.array([0.3, 0.7]), 0.2, 2
    for sigma in (0.1, 0.5, 3.0):
      x = np.linspace(-4, 4, 81)
      v, q = v0 + sigma**2, q0 + sigma**2

      def score(means, weights, variance, x=x):
        d = x[:, None] - means
        p = weights * np.exp(-(d**2) / (2 * variance))
        return -(p * d).sum(1) / p.sum(1) / variance

      i, j = np.divmod(np.arange(4), 2)
      m, half = (means[i] + means[j]) / 2, v / 2
      w_pair = weights[i] * weights[j]
      w_pair = w_pair * np.exp(-((means[i] - means[j]) ** 2) / (4 * v))
      variance = 1 / (1 / half - 1 / q)
      centre = m / half * variance
      # The factor that completing the square leaves.
      w_pair = w_pair * np.exp(centre**2 / (2 * variance) - m**2 / (2 * half))
      expected = x + sigma**2 * score(centre, w_pair, variance)

      D = x + sigma**2 * score(means, weights, v)
      D_guide = x - sigma**2 * x / q
      shaped = lambda a: jnp.asarray(a, jnp.float32)[:, None, None, None]
      out = Guidance(guide_scale=2.0).apply(
        shaped(D), None, None, shaped(D_guide)
      )
      np.testing.assert_allclose(out[:, 0, 0, 0], expected, atol=2e-5)
