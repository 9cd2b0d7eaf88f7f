"""The augmentation against goldens and a float64 twin written from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from diffit_jax.diffusion import augment
from diffit_jax.errors import UserError

NAMES = (
  "xflip",
  "yflip",
  "scale",
  "rotate",
  "aniso_weight",
  "aniso_angle",
  "translate_x",
  "translate_y",
)
ALL = dict(
  xflip=1,
  yflip=1,
  scale=0.5,
  rotate=0.4,
  aniso_weight=1,
  aniso_angle=0.3,
  translate_x=0.5,
  translate_y=-0.25,
)


def batch(*rows):
  """Parameter dicts of single images, zero where unnamed -> one of arrays."""
  return {
    name: jnp.array([row.get(name, 0) for row in rows], jnp.float32)
    for name in NAMES
  }


def white(*shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# --- identities -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 6, 11, 1)])
def test_flips_are_exact(shape):
  x = white(*shape)
  out = augment.augment(x, batch(dict(xflip=1), dict(yflip=1)))
  np.testing.assert_array_equal(out[0], x[0, :, ::-1])
  np.testing.assert_array_equal(out[1], x[1, ::-1])


def test_nothing_drawn_is_the_image_bit_for_bit():
  x = white(1, 8, 8, 3)
  np.testing.assert_array_equal(augment.augment(x, batch({})), x)


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (9, 20)])
def test_filters_alone_give_the_image_back(shape):
  # A weight this small makes the map exactly the identity, through every step.
  # sym6 is orthonormal, so what is left is float32 rounding: the golden's 8e-7.
  x = white(1, *shape, 3)
  out = augment.augment(x, batch(dict(scale=1e-12)))
  assert not np.array_equal(out, x)
  np.testing.assert_allclose(out, x, atol=8e-7)


def test_images_do_not_see_each_other():
  x = white(3, 8, 8, 2)
  rows = [ALL, dict(scale=-3), dict(translate_x=2)]
  together = augment.augment(x, batch(*rows))
  for i, row in enumerate(rows):
    alone = augment.augment(x[i : i + 1], batch(row))
    np.testing.assert_allclose(together[i], alone[0], atol=2e-6)


# --- golden values: augmentation in GOLDENS.md -------------------------------

GOLDEN = {
  "scale up": (
    dict(scale=0.5),
    [-0.93454, 0.937066, 0.968336, -0.286481],
    -17.737186,
  ),
  "scale down": (
    dict(scale=-1),
    [-0.984261, 0.943644, 0.861819, 0.047074],
    -20.686562,
  ),
  "rotate": (
    dict(rotate=0.4),
    [-0.701994, -0.293478, -0.319829, -0.810606],
    -71.914513,
  ),
  "aniso": (
    dict(aniso_weight=1, aniso_angle=0.3),
    [-0.9849, 0.996742, 0.842438, -0.323504],
    -7.603954,
  ),
  "translate": (
    dict(translate_x=0.5, translate_y=-0.25),
    [-0.998055, 0.993316, 0.893059, -0.124895],
    -20.425406,
  ),
  "all": (ALL, [0.649124, -0.80944, -0.261337, 0.417672], -65.639427),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
  row, pixels, total = GOLDEN[case]
  c, y, x = np.mgrid[:3, :16, :16]
  image = np.sin(0.5 * x + 0.3 * y + c).transpose(1, 2, 0)[None]
  out = np.asarray(augment.augment(jnp.float32(image), batch(row)))[0]
  found = [out[5, 7, 0], out[0, 0, 1], out[15, 3, 2], out[8, 15, 0]]
  # Listed to 1e-6, of which half; the rest is the rounding of coordinates of
  # the upsampled grid, up to 92 +- 4e-6, times the slope of at most 0.3.
  np.testing.assert_allclose(found, pixels, atol=2e-6)
  # 768 such pixels, whose roundings have either sign. Measured: 1.7e-5.
  np.testing.assert_allclose(out.astype(np.float64).sum(), total, atol=5e-5)


def test_golden_labels():
  np.testing.assert_allclose(
    augment.labels(batch(ALL, {})),
    [
      [1, 1, 0.5, -0.07893902, 0.3894184, 0.9553365, 0.2955202, 0.5, -0.25],
      [0] * 9,
    ],
    atol=1e-7,
  )


# --- an independent float64 twin --------------------------------------------


def translation(x, y):
  return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def stretch(x, y):
  return np.diag([x, y, 1.0])


def rotation(angle):
  c, s = np.cos(angle), np.sin(angle)
  return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def filtered(x, taps, pad, axis):
  """Correlation with zeros beyond the ends, "valid" after padding by pad."""
  return np.apply_along_axis(
    lambda line: np.correlate(np.pad(line, pad), taps, "valid"), axis, x
  )


def reference(image, row):
  """Facts 5.6 step by step for one [h, w] plane, with its own coordinates."""
  p = {name: float(row.get(name, 0)) for name in NAMES}
  h, w = image.shape
  x = image.astype(np.float64)
  x = np.fliplr(x) if p["xflip"] else x
  x = np.flipud(x) if p["yflip"] else x
  s, s_a = 2 ** (0.2 * p["scale"]), 2 ** (0.2 * p["aniso_weight"])
  r = p["aniso_angle"]
  G = (
    stretch(1 / s, 1 / s)
    @ rotation(p["rotate"])
    @ rotation(-r)
    @ stretch(1 / s_a, s_a)
    @ rotation(r)
    @ translation(-0.125 * w * p["translate_x"], -0.125 * h * p["translate_y"])
  )
  # (1), (2)
  x = np.pad(x, ((h - 1, h - 1), (w - 1, w - 1)), mode="reflect")
  up = np.zeros([2 * n - 1 for n in x.shape])
  up[::2, ::2] = x
  for axis in (0, 1):
    up = filtered(up, augment.SYM6[::-1], 6, axis)
  G = stretch(2, 2) @ G @ stretch(0.5, 0.5)
  G = translation(-0.5, -0.5) @ G @ translation(0.5, 0.5)
  # (3)
  (h_in, w_in), (h_out, w_out) = up.shape, (2 * (h + 6), 2 * (w + 6))
  G = stretch(2 / w_in, 2 / h_in) @ G @ stretch(w_out / 2, h_out / 2)
  u, v = np.meshgrid(
    (2 * np.arange(w_out) + 1) / w_out - 1,
    (2 * np.arange(h_out) + 1) / h_out - 1,
  )
  u, v, _ = np.tensordot(G, np.stack([u, v, np.ones_like(u)]), 1)
  points = [((v + 1) * h_in - 1) / 2, ((u + 1) * w_in - 1) / 2]
  x = ndimage.map_coordinates(up, points, order=1, mode="grid-constant")
  # (4)
  for axis in (0, 1):
    x = filtered(x, augment.SYM6, 5, axis)
    x = np.take(x, range(0, x.shape[axis], 2), axis)
    x = np.take(x, range(3, x.shape[axis] - 3), axis)
  return x


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (9, 14), (13, 8)])
def test_twin(shape):
  rng = np.random.default_rng(sum(shape))
  n = 24
  rows = [
    dict(
      xflip=rng.integers(2),
      yflip=rng.integers(2),
      scale=rng.normal(),
      rotate=rng.uniform(-np.pi, np.pi),
      aniso_weight=rng.normal(),
      aniso_angle=rng.uniform(-np.pi, np.pi),
      translate_x=rng.normal(),
      translate_y=rng.normal(),
    )
    for _ in range(n)
  ]
  rows += [dict(scale=-8), dict(translate_x=9), dict(scale=-9, rotate=0.7)]
  images = white(len(rows), *shape, 2)
  out = augment.augment(images, batch(*rows))
  expected = [
    np.stack([reference(image[..., c], row) for c in (0, 1)], axis=-1)
    for image, row in zip(images, rows)
  ]
  # White noise has slopes up to 2 per element of the upsampled grid, and a
  # float32 coordinate there is off by up to 1e-5. Measured: 5e-6.
  np.testing.assert_allclose(out, expected, atol=2e-5)


def test_float64_images_are_augmented_in_float64(x64):
  rows = [dict(scale=0.3, rotate=1.1, aniso_weight=-0.4, aniso_angle=0.2)]
  rows += [dict(translate_x=0.7, translate_y=-1.3, xflip=1)]
  image = np.random.default_rng(8).uniform(-1, 1, (2, 9, 8, 1))
  params = {k: np.array([row.get(k, 0.0) for row in rows]) for k in NAMES}
  out = augment.augment(jnp.asarray(image), params)
  expected = [reference(x[..., 0], row) for x, row in zip(image, rows)]
  np.testing.assert_allclose(out[..., 0], expected, atol=1e-12)


def test_weights_belong_to_their_pixels_at_64():
  # Thousands of points fall next to whole numbers, where rounding decides which
  # pixels are read; a wrong pairing shows as an error of order one.
  angles = np.random.default_rng(3).uniform(-3, 3, 8)
  rows = [dict(rotate=a, translate_x=1 / 8, translate_y=-1 / 8) for a in angles]
  images = white(8, 64, 64, 1)
  out = augment.augment(images, batch(*rows))
  for i, row in enumerate(rows):
    np.testing.assert_allclose(
      out[i, ..., 0], reference(images[i, ..., 0], row), atol=1e-4
    )


# --- the draw ---------------------------------------------------------------


def test_gates_and_distributions():
  n, p = 40_000, 0.15
  params = {
    k: np.float64(v) for k, v in augment.draw(jax.random.key(0), n, p).items()
  }
  assert sorted(params) == sorted(NAMES)

  def share(values, expected):  # four standard errors of a share
    tolerance = 4 * (expected * (1 - expected) / n) ** 0.5
    assert abs(np.mean(values) - expected) < tolerance

  share(params["xflip"], 0.5)
  share(params["yflip"], p / 2)
  for name in ("scale", "rotate", "aniso_weight", "translate_x"):
    share(params[name] != 0, p)
  share(params["aniso_angle"] != 0, p / 2)
  moved = params["translate_x"] != 0
  np.testing.assert_array_equal(moved, params["translate_y"] != 0)
  stretched = params["aniso_weight"] != 0
  assert not np.any(params["aniso_angle"][~stretched])
  # Gates are independent of each other.
  share((params["scale"] != 0) & (params["rotate"] != 0) & moved, p**3)
  for name in ("scale", "aniso_weight", "translate_x", "translate_y"):
    values = params[name][params[name] != 0]
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.std() - 1) < 4 / (2 * len(values)) ** 0.5
  for name in ("rotate", "aniso_angle"):
    values = params[name][params[name] != 0]
    assert abs(values).max() <= np.pi + 1e-6
    # Uniform on (-pi, pi): std pi / sqrt 3, whose estimate is off by
    # sqrt((1.8 - 1) / 4n) of it.
    std = np.pi / 3**0.5
    assert abs(values.std() / std - 1) < 4 * (0.2 / len(values)) ** 0.5
  correlation = np.corrcoef(
    params["translate_x"][moved], params["translate_y"][moved]
  )[0, 1]
  assert abs(correlation) < 4 / moved.sum() ** 0.5


def test_draw_is_of_its_key_alone():
  keys = jax.random.split(jax.random.key(7), 5)
  five = augment.draw_keys(keys, 0.9)
  split = augment.draw(jax.random.key(7), 5, 0.9)
  third = augment.draw_one(keys[2], 0.9)
  for name in NAMES:
    np.testing.assert_array_equal(five[name], split[name])
    assert five[name][2] == third[name]
    assert five[name].dtype == jnp.float32


@pytest.mark.parametrize("p, flips", [(0.0, {0}), (1.0, {0, 1})])
def test_extreme_probabilities(p, flips):
  params = augment.draw(jax.random.key(1), 64, p)
  assert set(np.unique(params["xflip"])) == flips
  assert set(np.unique(params["yflip"])) == flips
  assert np.all((params["scale"] != 0) == (p == 1))


def test_probability_out_of_range():
  with pytest.raises(UserError, match="p=1.5"):
    augment.draw(jax.random.key(0), 2, 1.5)


def test_one_compilation_whatever_is_drawn():
  traces = []

  @jax.jit
  def step(key, x):
    traces.append(1)
    params = augment.draw_keys(jax.random.split(key, len(x)), 0.5)
    return augment.augment(x, params), augment.labels(params)

  for seed in range(3):
    images, labels = step(jax.random.key(seed), white(4, 8, 8, 1))
  assert len(traces) == 1
  assert images.shape == (4, 8, 8, 1) and labels.shape == (4, 9)
