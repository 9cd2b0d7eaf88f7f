"""8-bit values by both rules, grids and PNG files."""

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from diffit_jax import pictures
from diffit_jax.errors import UserError


@pytest.mark.parametrize("array", [np.float32, jnp.float32])
@pytest.mark.parametrize(
  "rule, expected",
  # 127.5 x + 128 and 127.5 (x + 1), both cut to 0..255, then towards zero.
  [("edm", [0, 0, 64, 128, 255, 255]), ("adm", [0, 0, 63, 127, 255, 255])],
)
def test_to_uint8(array, rule, expected):
  out = pictures.to_uint8(array([-2, -1, -0.5, 0, 1, 3]), rule)
  assert out.dtype == np.uint8
  np.testing.assert_array_equal(out, expected)


def test_edm_rule_undoes_the_scaling_of_the_data():
  pixels = np.arange(256)
  x = (pixels / 127.5 - 1).astype(np.float32)
  np.testing.assert_array_equal(pictures.to_uint8(x), pixels)


def test_to_uint8_knows_its_rules():
  with pytest.raises(UserError, match="'dit' is unknown; allowed: edm, adm"):
    pictures.to_uint8(np.zeros(1), "dit")


def test_grid_runs_along_rows():
  cells = np.arange(5).reshape(5, 1, 1, 1) + np.ones((5, 2, 3, 1), int)
  grid = pictures.image_grid(cells, columns=2)
  assert grid.shape == (6, 6, 1)
  np.testing.assert_array_equal(grid[::2, ::3, 0], [[1, 2], [3, 4], [5, 0]])
  np.testing.assert_array_equal(grid[:2, :3, 0], 1)


def test_page_separates_and_enlarges_small_images():
  page = pictures.page(np.full((5, 8, 8, 1), 255, np.uint8))
  assert page.shape == (2 + 2 * 34, 2 + 3 * 34, 1)  # 8 x 4 = 32, gaps of 2
  assert (page[2:34, 2:34] == 255).all() and (page[34:36] == 0).all()
  assert pictures.page(np.ones((4, 64, 64, 3), np.uint8)).shape == (134, 134, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png(tmp_path, channels):
  image = np.arange(4 * 5 * channels, dtype=np.uint8).reshape(4, 5, channels)
  pictures.write_png(tmp_path / "a.png", image)
  read = np.asarray(Image.open(tmp_path / "a.png"))
  np.testing.assert_array_equal(read.reshape(image.shape), image)
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
