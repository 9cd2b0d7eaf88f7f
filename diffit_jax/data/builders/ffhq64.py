"""FFHQ at 64x64 as EDM makes it: the set of the paper's Table 2."""

import os
from typing import Any

from absl import logging

from diffit_jax.data import sources
from diffit_jax.data.builders import image_folder

_NUM_IMAGES = 70_000


class Ffhq64(image_folder.ImageFolder, skip_registration=True):
  """FFHQ faces at 64x64 without classes.

  From `images1024x1024`, or the zip file that EDM's dataset tool makes, by one
  LANCZOS resize; images that are 64x64 already stay as they are. From
  `thumbnails128x128` the pixels differ slightly: statistics for FID must come
  from the same prepared set.
  """

  def __init__(
    self,
    *,
    name: str = "ffhq64",
    data_dir: str,
    source: sources.Source,
    max_bad_fraction: float = 0.01,
    encoding: str | None = None,
  ):
    if len(source.sizes) != _NUM_IMAGES:
      logging.warning(
        "FFHQ has %d images; %s has %d",
        _NUM_IMAGES,
        source.path,
        len(source.sizes),
      )
    super().__init__(
      name=name,
      data_dir=data_dir,
      source=source,
      resolution=64,
      crop="edm",
      max_bad_fraction=max_bad_fraction,
      encoding=encoding,
    )


def recipe(
  source: str,
  *,
  name: str = "ffhq64",
  max_bad_fraction: float = 0.01,
  encoding: str | None = None,
) -> dict[str, Any]:
  """What `preparation.prepare` needs to know to make this data set."""
  images = sources.open_source(source, use_labels=False)
  return {
    "make_builder": lambda folder: Ffhq64(
      name=name,
      data_dir=folder,
      source=images,
      max_bad_fraction=max_bad_fraction,
      encoding=encoding,
    ),
    "name": name,
    "encoding": encoding,
    "settings": {
      "builder": "ffhq64",
      "source_listing": images.listing_hash(),
    },
    "source": os.path.abspath(source),
  }
