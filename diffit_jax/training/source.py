"""Where a run's batches come from: images, prepared latents, or both.

A latent model trains on the moments (mean and log-variance) that a VAE gave.
These come with the data set, or from images that are encoded on the devices
just before the step, by a program of its own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax.autoencoder import Autoencoder
from diffit_jax.autoencoder.patch_code import PatchCode
from diffit_jax.data import builders, pipeline
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.parallel import sharding

Codec = Autoencoder | PatchCode
Encoder = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
CONTENTS = ("latents", "images")


def open_training_set(
  config: config_dict.ConfigDict, data_dir: str | None, codec: Codec | None
) -> pipeline.Dataset:
  """Opens the config's data set and checks that it fits the config.

  Args:
    config: the resolved config.
    data_dir: folder of the prepared data sets; None is $TFDS_DATA_DIR.
    codec: the autoencoder, where one was given.
  """
  data, side = config.data, config.data.resolution
  channels = config.model.channels
  encodes = is_encoding(config)
  if encodes and codec is None:
    raise UserError(
      "data.content='images' needs the VAE that encodes them: give its"
      " diffusers folder as --vae=..., or train from prepared latents"
    )
  pixels, kind = side, None
  if kinds.is_latent(config):
    pixels *= config.autoencoder.down_factor
    kind = None if encodes else "imagenet_latents"
  data_dir = data_dir or dataset_lib.default_data_dir()
  command = builders.command(data.name, data_dir, kind, pixels)
  dataset = pipeline.open_dataset(
    data.name, data_dir, data.split, command=command
  )
  if encodes:
    side *= codec.down_factor
    is_patch = isinstance(codec, PatchCode)
    channels = channels // codec.down_factor**2 if is_patch else 3
  if encodes or not kinds.is_latent(config):
    pipeline.check_matches(dataset, side, channels, data.num_classes)
  else:
    pipeline.check_latents(
      dataset,
      side,
      channels,
      data.num_classes,
      vae_hash=codec.hash if codec else None,
      scaling_factor=config.autoencoder.scaling_factor,
    )
  return dataset


def identity(dataset: pipeline.Dataset) -> dict:
  """What tells a data set from another of the same name."""
  settings = dataset.metadata.get("settings", {})
  found = {
    "num_images": dataset.num_images,
    "content_hash": dataset.metadata.get("content_hash"),
    "vae_hash": settings.get("vae_hash"),
  }
  return {key: value for key, value in found.items() if value is not None}


def is_encoding(config: config_dict.ConfigDict) -> bool:
  """Whether images are encoded on the fly."""
  if not kinds.is_latent(config):
    return False
  if config.data.content not in CONTENTS:
    raise UserError(
      f"data.content={config.data.content!r}: use one of {CONTENTS}"
    )
  return config.data.content == "images"


def make_batches(
  dataset: pipeline.Dataset, config: config_dict.ConfigDict, first_step: int
) -> pipeline.Pipeline:
  """The batches of this process from a step on.

  Args:
    dataset: the open data set.
    config: the resolved config.
    first_step: number of steps taken before the first batch.
  """
  return pipeline.Pipeline(
    dataset,
    global_batch_size=config.batch_size,
    seed=config.seed,
    start_index=first_step * config.batch_size,
    flip=config.data.flip,
    shard_index=jax.process_index(),
    num_shards=jax.process_count(),
    num_threads=config.num_threads,
  )


def make_encoder(
  config: config_dict.ConfigDict, codec: Codec | None, mesh: Mesh
) -> Encoder:
  """What a batch goes through on the devices before the step.

  Where the config encodes on the fly, "image" [b, H, W, ch] uint8 becomes
  "moments"; else nothing is done.

  Args:
    config: the resolved config.
    codec: the autoencoder; its weights are copied to every device once.
    mesh: the devices, over which the batch is split.
  """
  if not is_encoding(config):
    return lambda batch: batch
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  params = jax.device_put(codec.params, whole)

  def encode(params, images):
    x = images.astype(jnp.float32) / 127.5 - 1
    return jnp.concatenate(codec.encode_fn(params, x), axis=-1)

  run = jax.jit(encode, in_shardings=(whole, split), out_shardings=split)

  def encode_batch(batch):
    rest = {name: x for name, x in batch.items() if name != "image"}
    return {**rest, "moments": run(params, batch["image"])}

  return encode_batch
