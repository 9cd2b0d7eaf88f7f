"""Resizing against the per-pixel definition, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import RESIZE_RULES, resize


def lerp(row: np.ndarray, i: int, n_out: int, rule: str):
  """Entry i of a row resized to n_out, straight from the definition."""
  n_in = len(row)
  scale = n_in / n_out
  src = i * scale if rule == "tf1" else max((i + 0.5) * scale - 0.5, 0.0)
  low = min(math.floor(src), n_in - 1)
  high = min(low + 1, n_in - 1)
  return row[low] + (src - low) * (row[high] - row[low])


def by_pixel(image: np.ndarray, side: int, rule: str) -> np.ndarray:
  image = image.astype(np.float64)
  rows = np.stack([lerp(image, i, side, rule) for i in range(side)])
  columns = rows.swapaxes(0, 1)
  return np.stack([lerp(columns, j, side, rule) for j in range(side)], axis=1)


def axis(values, n_out: int, rule: str) -> np.ndarray:
  return np.asarray(
    resize.resize_axis(jnp.asarray(values, jnp.float32), n_out, 0, rule)
  )


@pytest.mark.parametrize(
  "rule,expected",
  [
    ("tf1", [0, 5.71429, 12.85714, 24.28572, 38.57143, 55.71429, 60]),
    ("pytorch_fid", [0, 3.57143, 9.28571, 20, 32.14286, 49.28571, 60]),
  ],
)
def test_four_pixels_to_seven(rule, expected):
  # Made with TensorFlow and PyTorch, printed to 5 digits.
  np.testing.assert_allclose(
    axis([0, 10, 30, 60], 7, rule), expected, atol=1e-5
  )


def test_ramp_shrinks_by_the_tf1_rule():
  ramp = axis(np.arange(512), 299, "tf1")
  # Made with TensorFlow, whose source positions are float32: one part in 2^23.
  np.testing.assert_allclose(
    ramp[[1, 150, 298]], [1.71237457, 256.85617, 510.28763], rtol=1.3e-7
  )


@pytest.mark.parametrize("rule", RESIZE_RULES)
@pytest.mark.parametrize(
  "shape", [(5, 9), (32, 32), (299, 40), (298, 301), (600, 411)]
)
def test_equals_the_definition_pixel_by_pixel(shape, rule):
  images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
  got = jax.jit(resize.prepare, static_argnums=(1, 2))(images, 299, rule)
  assert got.dtype == jnp.float32
  want = np.stack([by_pixel(image, 299, rule) for image in images])
  if rule == "tf1":
    want = (want - 128) / 128
  else:
    want = 2 * (want / 255) - 1
  # Rounding of float32 on values of up to 255, over 128.
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
  "rule,zero,full", [("tf1", -1, 127 / 128), ("pytorch_fid", -1, 1)]
)
def test_size_299_is_only_normalised(rule, zero, full):
  image = np.zeros((1, 299, 299, 3), np.uint8)
  image[:, ::2] = 255
  got = resize.prepare(jnp.asarray(image), 299, rule)
  np.testing.assert_allclose(got[:, 1::2], zero, atol=1e-6)
  np.testing.assert_allclose(got[:, ::2], full, atol=1e-6)


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_own_size_has_taps_on_the_pixels(rule):
  # What lets `resize_axis` leave an axis of its own size as it is.
  low, _, f = resize.taps(299, 299, rule)
  np.testing.assert_array_equal(low, np.arange(299))
  np.testing.assert_array_equal(f, 0)


def test_there_is_no_antialiasing():
  x = np.random.default_rng(0).normal(size=20)
  np.testing.assert_array_equal(axis(x, 10, "tf1"), x[::2].astype(np.float32))
  # Half-pixel centres meet halfway between neighbours, and no further.
  np.testing.assert_allclose(
    axis(x, 5, "pytorch_fid"), (x[1::4] + x[2::4]) / 2, rtol=1e-5
  )


def test_taps_stay_inside_for_every_size():
  for rule in RESIZE_RULES:
    for n_in in (1, 2, 28, 64, 255, 512, 1024):
      low, high, f = resize.taps(n_in, 299, rule)
      assert low.min() >= 0 and high.max() <= n_in - 1
      assert f.min() >= 0 and f.max() < 1


def test_unknown_rule_is_refused():
  with pytest.raises(UserError, match=r"'bicubic'.*tf1 or pytorch_fid"):
    resize.check_rule("bicubic")
