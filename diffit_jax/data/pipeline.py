"""From a prepared data set to batches: one global order, resumable anywhere.

Image i of the endless stream (i = 0, 1, 2, ... over all epochs) depends on the
seed alone: epoch e = i // num_images is a permutation drawn from (seed, e), and
the mirror of image i is drawn from (seed, i). A batch is a run of consecutive
i, dealt out to the shards, so a pipeline's whole state is one integer, and a
run may go on with another number of hosts: shard s of n gets the images
start + s, start + s + n, ... of each global batch.

Only numpy, Pillow and Grain run here; no TensorFlow, no device.
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from diffit_jax.data import transforms
from diffit_jax.data.dataset import (
  Dataset,
  check_latents,
  check_matches,
  open_dataset,
)
from diffit_jax.data.records import damage
from diffit_jax.errors import UserError

__all__ = [
  "Dataset",
  "Pipeline",
  "check_latents",
  "check_matches",
  "open_dataset",
]

Batch = dict[str, np.ndarray]


class Pipeline(Iterator[Batch]):
  """Endless batches of a data set, decoded in threads ahead of their use.

  Each batch is {"image": [b, h, w, c] uint8, "label": [b] int32,
  "index": [b] uint32} with b = global_batch_size / num_shards; `index` is the
  global position i in the stream, which every random draw of the training step
  is keyed on.

  Of a data set of latents it is {"moments": [b, h, w, 2c] in the data set's
  float type, "label", "index"}: mean, then log-variance, of the unscaled latent
  of the image or of its mirror image, which is not the mirror of its latent.

  Use it as a context manager, or call `close`, to stop its threads.
  """

  def __init__(
    self,
    dataset: Dataset,
    *,
    global_batch_size: int,
    seed: int,
    start_index: int = 0,
    flip: bool = False,
    shard_index: int = 0,
    num_shards: int = 1,
    num_threads: int = 4,
    prefetch: int = 8,
  ):
    """Opens the stream at image `start_index`.

    Args:
      dataset: what to read.
      global_batch_size: images per step over all shards.
      seed: seed of the order and of the mirroring, 0 or above.
      start_index: images already consumed, a multiple of the batch.
      flip: whether to mirror each image with probability one half.
      shard_index: which part of each global batch is wanted.
      num_shards: parts of a global batch, usually one per host.
      num_threads: batches that are decoded at the same time.
      prefetch: batches that are kept ready.

    Raises:
      UserError: numbers that do not go together.
    """
    if global_batch_size < 1 or global_batch_size % num_shards:
      raise UserError(
        f"batch size {global_batch_size} cannot be divided over {num_shards}"
        " hosts"
      )
    if start_index % global_batch_size:
      raise UserError(
        f"{start_index=} is not a multiple of the batch size"
        f" {global_batch_size}"
      )
    # Grain's seed of epoch e is seed + e: unless the seeds are spread out,
    # run 0's second epoch would be run 1's first.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    stream = (
      grain.MapDataset.source(dataset.source)
      .shuffle(seed=order_seed)
      .repeat(None)
      .map_with_index(_decoder(dataset, seed, flip))
    )
    self._iterator = iter(
      grain.experimental.ElasticIterator(
        stream,
        global_batch_size,
        grain.sharding.ShardOptions(shard_index, num_shards),
        read_options=grain.ReadOptions(
          num_threads=num_threads, prefetch_buffer_size=prefetch
        ),
      )
    )
    self._iterator.set_state({"global_next_index": start_index})

  @property
  def next_index(self) -> int:
    """Images consumed so far by all shards: the state to save."""
    return self._iterator.get_state()["global_next_index"]

  def __next__(self) -> Batch:
    return next(self._iterator)

  def close(self) -> None:
    """Stops the threads; the pipeline gives no more batches."""
    self._iterator.close()

  def __enter__(self) -> "Pipeline":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def is_mirrored(seed: int, index: int) -> bool:
  """The coin of image `index` of the stream: true for one half of them."""
  bits = np.random.Philox(key=[seed, index]).random_raw()
  return bool(bits >> 63)


def _decoder(
  dataset: Dataset, seed: int, flip: bool
) -> Callable[[int, dict[str, Any]], Batch]:
  """The function (index in the stream, record) -> example."""
  read = _read_moments if dataset.kind == "latent" else _read_image

  def decode(index: int, record: dict[str, Any]) -> Batch:
    mirrored = flip and is_mirrored(seed, index)
    return {
      **read(dataset, record, mirrored),
      "label": np.int32(record["label"]),
      "index": np.uint32(index),
    }

  return decode


def _read_image(dataset: Dataset, record: dict[str, Any], mirrored: bool):
  try:
    image = transforms.decode(record["image"], dataset.image_shape[-1])
  except transforms.UNREADABLE as error:
    raise damage(dataset.directory, error) from error
  if image.shape != dataset.image_shape:
    raise UserError(
      f"an image of the data set has shape {image.shape}, not"
      f" {dataset.image_shape}"
    )
  return {"image": transforms.flip(image) if mirrored else image}


def _read_moments(dataset: Dataset, record: dict[str, Any], mirrored: bool):
  del dataset  # TFDS has seen to the shape
  return {"moments": record["mirror_moments" if mirrored else "moments"]}
