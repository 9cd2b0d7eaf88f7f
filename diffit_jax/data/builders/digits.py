"""Handwritten digits that ship inside scikit-learn: real data, no download."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn import datasets

from diffit_jax.data.builders import base


class Digits(base.ImageBuilder, skip_registration=True):
  """The 1,797 digits of scikit-learn, 8x8 gray, 10 classes, all in `train`.

  Values 0..16 of the source become round(v * 255 / 16).
  """

  def __init__(
    self, *, name: str = "digits", data_dir: str, encoding: str | None = None
  ):
    super().__init__(
      name=name,
      data_dir=data_dir,
      resolution=8,
      channels=1,
      class_names=[str(digit) for digit in range(10)],
      encoding=encoding,
    )

  def examples(self) -> Iterator[dict[str, Any]]:
    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    for index, (image, label) in enumerate(zip(images, digits.target)):
      yield {
        "image": self.encode(image),
        "id": f"digit{index:04d}",
        "label": int(label),
      }


def recipe(*, encoding: str | None = None) -> dict[str, Any]:
  """What `preparation.prepare` needs to know to make this data set."""
  return {
    "make_builder": lambda folder: Digits(data_dir=folder, encoding=encoding),
    "name": "digits",
    "encoding": encoding,
    "settings": {"builder": "digits"},
    "source": "sklearn.datasets.load_digits",
  }
