"""Prepares a data set for training, once: a TFDS folder of ArrayRecord files.

  python -m diffit_jax.prepare NAME [--source=...] [--data_dir=...]

NAME is one of
  digits        the 1,797 handwritten digits inside scikit-learn (8x8 gray)
  cifar10       TFDS's own builder; downloads, or takes --source=FILE.tar.gz
  ffhq64        FFHQ faces from a folder or zip file, by EDM's rule to 64x64
  image_folder  any folder or zip file of PNG, JPEG and WebP images, to
                --resolution by --crop; labels from sub-folders or dataset.json
  imagenet_latents
                what a VAE makes of images and of their mirror images, cropped
                by the ADM rule: the data of the latent model

ImageNet as images is image_folder by the ADM rule, as latents it comes from the
same folder, or from the images so prepared:

  python -m diffit_jax.prepare image_folder --source=imagenet/train
      --crop=adm --resolution=256 --name=imagenet_images
  python -m diffit_jax.prepare imagenet_latents --source=imagenet/train
      --vae=sd-vae-ft-ema --resolution=256

Latents take long, so they are made in shards that stay when it is stopped (exit
code 75) or killed: the same command goes on. Hosts that share DATA_DIR divide
the shards by --shard=0/4, --shard=1/4 ...; the one that finishes the last shard
publishes the data set, and the others end with code 0 before that.

The data set is called NAME, or --name, and lies in DATA_DIR/NAME/VERSION;
`config.data.name` takes the same name. A set that is there already with the
same settings stays; a killed run leaves nothing that training would read.
"""

import importlib
import pathlib
import re
import signal
from typing import Any

from absl import flags, logging

from diffit_jax import cli, interrupt
from diffit_jax.data.builders import KINDS
from diffit_jax.data.dataset import default_data_dir
from diffit_jax.data.transforms import CROPS
from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped, StopRequest

_SOURCE = cli.define_path(
  "source",
  "Folder or zip file of images (cifar10: the .tar.gz; imagenet_latents: also"
  " the name of a prepared set of images in DATA_DIR).",
)
_DATA_DIR = cli.define_path(
  "data_dir",
  "Where data sets live; $TFDS_DATA_DIR or ~/tensorflow_datasets if not set.",
)
_NAME = flags.DEFINE_string(
  "name", None, "What to call the data set; its builder's name if not set."
)
_RESOLUTION = flags.DEFINE_integer(
  "resolution",
  None,
  "Side of the prepared images (image_folder, imagenet_latents).",
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
_ENCODING = flags.DEFINE_enum(
  "encoding",
  None,
  ["png", "raw"],
  "Whether images are stored as PNG files or as pixels, which take more room"
  " and are read faster; batches are the same. If not set, raw up to 64x64 and"
  " png above (digits, ffhq64, image_folder).",
)
_VAE = cli.define_path("vae", "Diffusers folder of the VAE (imagenet_latents).")
_LATENT_DTYPE = flags.DEFINE_enum(
  "latent_dtype",
  "float16",
  ["float16", "float32"],
  "Float type of the stored mean and log-variance (imagenet_latents).",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Images that each device encodes at a time; 1 on a CPU and 8 elsewhere if not"
  " set (imagenet_latents).",
  lower_bound=1,
)
_NUM_SHARDS = flags.DEFINE_integer(
  "num_shards",
  None,
  "Files of the data set; one for each 1024 images, and 1024 at most, if not"
  " set (imagenet_latents).",
  lower_bound=1,
)
_SHARD = flags.DEFINE_string(
  "shard",
  "0/1",
  "Which part of the files this process makes: i/n with i from 0 to n - 1"
  " (imagenet_latents).",
)
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Make the data set anew even if it is there."
)

def main(kind: str) -> int | None:
  signal.signal(signal.SIGTERM, interrupt.on_signal)  # tidy up, as ^C
  _check_flags(kind)
  data_dir = _DATA_DIR.value or default_data_dir()
  if kind == "imagenet_latents":
    return _prepare_latents(data_dir)
  # TFDS takes a second to import: not before --help or a mistake.
  from diffit_jax.data import preparation

  directory = preparation.prepare(
    **_recipe(kind),
    data_dir=data_dir,
    overwrite=_OVERWRITE.value,
  )
  _report(directory)
  return None


def _prepare_latents(data_dir: str) -> int:
  """Makes this process's part of the latents; returns the exit code."""
  from diffit_jax.data.builders import imagenet_latents

  part, num_parts = _part()
  with StopRequest() as stop:
    images = imagenet_latents.open_images(
      _SOURCE.value, data_dir, _RESOLUTION.value
    )
    encoder, batch_size = _load_encoder()
    try:
      directory = imagenet_latents.prepare(
        images,
        encoder,
        name=_NAME.value or "imagenet_latents",
        data_dir=data_dir,
        resolution=_RESOLUTION.value,
        latent_dtype=_LATENT_DTYPE.value,
        num_shards=_NUM_SHARDS.value,
        part=part,
        num_parts=num_parts,
        batch_size=batch_size,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        overwrite=_OVERWRITE.value,
        should_stop=lambda: stop.requested,
      )
    except Stopped:
      logging.info("stopped; the same command goes on from the finished shards")
      raise
  if directory:
    _report(directory)
  else:
    logging.info(
      "part %s is done; the prepare that makes the last shard of the other"
      " parts publishes the data set",
      _SHARD.value,
    )
  return 0


def _report(directory: pathlib.Path) -> None:
  """Says what the data set holds, and prints where it is."""
  from diffit_jax.data import classes, dataset

  metadata = dataset.read_metadata(directory)
  logging.info(
    "%d images, %s", metadata["num_images"], classes.in_words(metadata)
  )
  print(directory)


def _load_encoder():
  """The VAE on every device of this host, and how many images they take."""
  import jax
  import numpy as np

  from diffit_jax.autoencoder import load_autoencoder
  from diffit_jax.data.builders import imagenet_latents
  from diffit_jax.parallel import mesh as mesh_lib
  from diffit_jax.parallel import platforms, sharding

  platforms.wake()
  vae = load_autoencoder(_VAE.value, chunk_size=_BATCH_SIZE.value)
  mesh = mesh_lib.make_mesh(devices=jax.local_devices())
  params = jax.device_put(vae.params, sharding.replicated(mesh))
  size = vae.chunk_size * mesh.size

  def encode(images):
    chunks = []
    for start in range(0, len(images), size):
      chunk = images[start : start + size]
      padding = [(0, size - len(chunk))] + [(0, 0)] * 3  # one compilation
      x = jax.device_put(np.pad(chunk, padding), sharding.batch_sharding(mesh))
      chunks.append(jax.device_get(vae.encode_fn(params, x)))
    return tuple(np.concatenate(each)[: len(images)] for each in zip(*chunks))

  encoder = imagenet_latents.LatentEncoder(
    encode=encode,
    down_factor=vae.down_factor,
    in_channels=vae.module.in_channels,
    latent_channels=vae.module.latent_channels,
    scaling_factor=vae.scaling_factor,
    hash=vae.hash,
    source=vae.source,
  )
  return encoder, size


def _part() -> tuple[int, int]:
  """--shard=i/n as (i, n)."""
  match = re.fullmatch(r"(\d+)/(\d+)", _SHARD.value)
  if not match or not int(match[1]) < int(match[2]):
    raise UserError(
      f"--shard={_SHARD.value} must be i/n with i from 0 to n - 1"
    )
  return int(match[1]), int(match[2])


def _recipe(kind: str) -> dict[str, Any]:
  """What to make, from the flags."""
  options = {flag: flags.FLAGS[flag].value for flag in KINDS[kind].takes}
  if "name" in options:
    options["name"] = _NAME.value or kind
  module = importlib.import_module(f"diffit_jax.data.builders.{kind}")
  return module.recipe(**options)


def _check_flags(kind: str) -> None:
  """Raises a UserError for flags that are missing, useless or out of range."""
  if kind not in KINDS:
    raise UserError(
      f"unknown data set {kind!r}: choose from {', '.join(KINDS)}"
    )
  takes, needs = KINDS[kind].takes, KINDS[kind].needs
  for flag in sorted({flag for each in KINDS.values() for flag in each.takes}):
    if flags.FLAGS[flag].present and flag not in takes:
      raise UserError(f"{kind} takes no --{flag}")
  for flag, value in needs.items():
    if flags.FLAGS[flag].value in (None, ""):
      raise UserError(f"{kind} needs --{flag}={value}")
  if _RESOLUTION.value is not None and _RESOLUTION.value < 1:
    raise UserError(f"--resolution={_RESOLUTION.value} must be at least 1")
  _part()
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
