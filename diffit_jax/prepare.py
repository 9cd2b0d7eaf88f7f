"""Prepares a data set for training, once: a TFDS folder of ArrayRecord files.

  python -m diffit_jax.prepare NAME [--source=...] [--data_dir=...]

NAME is one of
  digits        the 1,797 handwritten digits inside scikit-learn (8x8 gray)
  cifar10       TFDS's own builder; downloads, or takes --source=FILE.tar.gz
  ffhq64        FFHQ faces from a folder or zip file, by EDM's rule to 64x64
  image_folder  any folder or zip file of PNG, JPEG and WebP images, to
                --resolution by --crop; labels from sub-folders or dataset.json

The data set is called NAME, or --name, and lies in DATA_DIR/NAME/VERSION;
`config.data.name` takes the same name. A set that is there already with the
same settings stays; a killed run leaves nothing that training would read.
"""

import os
import re
import signal
from typing import Any

from absl import flags

from diffit_jax import cli
from diffit_jax.data.dataset import default_data_dir
from diffit_jax.data.transforms import CROPS
from diffit_jax.errors import UserError

_SOURCE = flags.DEFINE_string(
  "source", None, "Folder or zip file of images (cifar10: the .tar.gz)."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  None,
  "Where data sets live; $TFDS_DATA_DIR or ~/tensorflow_datasets if not set.",
)
_NAME = flags.DEFINE_string(
  "name", None, "What to call the data set; its builder's name if not set."
)
_RESOLUTION = flags.DEFINE_integer(
  "resolution", None, "Side of the prepared images (image_folder)."
)
_CROP = flags.DEFINE_enum(
  "crop",
  "center-crop",
  CROPS,
  "How image_folder makes images square: center-crop (middle square, then"
  " LANCZOS), edm (LANCZOS alone, stretches), adm (ADM's centre crop).",
)
_MAX_BAD_FRACTION = flags.DEFINE_float(
  "max_bad_fraction",
  0.01,
  "Share of unreadable files, from 0 to 1, that is skipped without an error.",
)
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Make the data set anew even if it is there."
)

_FLAGS_OF = {  # the flags that each builder listens to, beside the common ones
  "digits": [],
  "cifar10": ["source"],
  "ffhq64": ["source", "name", "max_bad_fraction"],
  "image_folder": ["source", "name", "resolution", "crop", "max_bad_fraction"],
}


def main(builder: str) -> None:
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up, as ^C
  _check_flags(builder)
  data_dir = os.path.expanduser(_DATA_DIR.value or default_data_dir())
  # TFDS takes a second to import: not before --help or a mistake.
  from diffit_jax.data import preparation

  directory = preparation.prepare(
    **_recipe(builder, data_dir),
    data_dir=data_dir,
    overwrite=_OVERWRITE.value,
  )
  print(directory)


def _recipe(builder: str, data_dir: str) -> dict[str, Any]:
  """What to make, from the flags."""
  from diffit_jax.data.builders import cifar10, digits, ffhq64, image_folder

  options = {
    "name": _NAME.value or builder,
    "max_bad_fraction": _MAX_BAD_FRACTION.value,
  }
  if builder == "digits":
    return digits.recipe()
  if builder == "cifar10":
    return cifar10.recipe(data_dir, source=_SOURCE.value)
  if builder == "ffhq64":
    return ffhq64.recipe(_SOURCE.value, **options)
  return image_folder.recipe(
    _SOURCE.value,
    resolution=_RESOLUTION.value,
    crop=_CROP.value,
    **options,
  )


def _check_flags(builder: str) -> None:
  """Raises a UserError for flags that are missing, useless or out of range."""
  if builder not in _FLAGS_OF:
    raise UserError(
      f"unknown data set {builder!r}: choose from {', '.join(_FLAGS_OF)}"
    )
  known = _FLAGS_OF[builder]
  for flag in _FLAGS_OF["image_folder"]:
    if flags.FLAGS[flag].present and flag not in known:
      raise UserError(f"{builder} takes no --{flag}")
  if builder in ("ffhq64", "image_folder") and not _SOURCE.value:
    raise UserError(f"{builder} needs --source=FOLDER_OR_ZIP")
  if builder == "image_folder" and (_RESOLUTION.value or 0) < 1:
    raise UserError(
      f"image_folder needs a --resolution of 1 or more, not {_RESOLUTION.value}"
    )
  if _NAME.value and not re.fullmatch(r"[a-z][a-z0-9_]*", _NAME.value):
    raise UserError(
      f"--name={_NAME.value} must be lower-case letters, digits and _"
    )
  if not 0 <= _MAX_BAD_FRACTION.value <= 1:
    raise UserError(
      f"--max_bad_fraction={_MAX_BAD_FRACTION.value:g} is not in 0..1"
    )


if __name__ == "__main__":
  cli.run(main, positional="NAME")
