"""Prepared data sets and image sources that several tests read."""

import pathlib

import numpy as np
from PIL import Image
import pytest

from diffit_jax.data import preparation
from diffit_jax.data.builders import digits, image_folder


def _noise(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def write_images():
  """write(folder, names, size): noise images of that (width, height)."""

  def write(folder, names, size=(12, 12)):
    for number, name in enumerate(names):
      path = pathlib.Path(folder, name)
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(_noise(number, size[1], size[0], 3)).save(path)
    return folder

  return write


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
  """Holds `digits`, and `ten`: ten 4x4 images, the red of number i being i."""
  root = tmp_path_factory.mktemp("data")
  preparation.prepare(**digits.recipe(), data_dir=str(root))
  source = root / "source"
  source.mkdir()
  for number in range(10):
    image = _noise(number, 4, 4, 3)
    image[..., 0] = number
    Image.fromarray(image).save(source / f"{number}.png")
  recipe = image_folder.recipe(str(source), name="ten", resolution=4)
  preparation.prepare(**recipe, data_dir=str(root))
  return str(root)
