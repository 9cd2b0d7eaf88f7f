"""Random access to the records of a prepared data set.

A record of TFDS is a tf.train.Example. TFDS's own decoder of it costs more than
all else that the pipeline does with an image of 64 x 64 pixels, so the two ways
in which our images and latents are stored, as files and as bytes of an array,
are read here; whatever else a data set of others may hold is left to TFDS.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
from typing import Any

import numpy as np

from diffit_jax.errors import UserError


def encoding_of(feature: Any) -> str:
  """Which of `transforms.ENCODINGS` a TFDS feature of images stands for."""
  import tensorflow_datasets as tfds

  return "png" if isinstance(feature, tfds.features.Image) else "raw"


def image_decoders(feature: Any) -> dict[str, Any] | None:
  """TFDS's `decoders` that leave image files alone; pixels need none."""
  import tensorflow_datasets as tfds

  if encoding_of(feature) == "raw":
    return None
  return {"image": tfds.decode.SkipDecoding()}


def damage(directory: str | os.PathLike, error: Exception) -> UserError:
  """What to raise where reading a data set ended in `error`."""
  return UserError(
    f"data set {directory} is damaged"
    f" ({(str(error).splitlines() or [''])[0][:200]}); remake it with the"
    " command that made it and --overwrite"
  )


class Records(Sequence):
  """The records of a split, cut down to some keys and "label".

  Image files stay bytes, arrays are read-only; a record without a label has
  label 0. Reading raises a UserError where the files are damaged.
  """

  def __init__(
    self, builder: Any, split: str, keys: Sequence[str], directory: os.PathLike
  ):
    """Opens the split.

    Args:
      builder: builder of TFDS, in ArrayRecord format.
      split: as TFDS takes it.
      keys: features that are wanted, beside the label.
      directory: folder of the data set, for errors.

    Raises:
      ValueError or KeyError, by TFDS: no such split.
    """
    import tensorflow_datasets as tfds

    self._directory = directory
    features = builder.info.features
    readers = {key: _reader(features[key]) for key in keys}
    if all(readers.values()):
      self._source = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
      self._parse = _make_parser(readers, "label" in features)
    else:
      decoders = image_decoders(features["image"]) if "image" in keys else None
      self._source = builder.as_data_source(split, decoders=decoders)
      self._parse = lambda record: _keep(record, keys)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    # Not `__getitems__([index])`: ArrayRecord starts a pool of threads in each
    # call of that, which takes ten times as long as reading one record.
    with self._damage_as_user_error():
      return self._parse(self._source[index])

  def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
    with self._damage_as_user_error():
      return [self._parse(each) for each in self._source.__getitems__(indices)]

  def __repr__(self) -> str:
    return f"Records({self._source!r})"

  @contextlib.contextmanager
  def _damage_as_user_error(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # ArrayRecord and TFDS have no class for damage
      raise damage(self._directory, error) from error


def _reader(feature: Any) -> Callable[[bytes], Any] | None:
  """What makes a value of its stored bytes; None where TFDS is to do it."""
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.Image):
    return lambda data: data
  if not isinstance(feature, tfds.features.Tensor):
    return None
  shape, dtype = feature.shape, feature.np_dtype
  if feature.to_json_content().encoding != "bytes" or None in shape:
    return None
  return lambda data: np.frombuffer(data, dtype).reshape(shape)


def _make_parser(
  readers: dict[str, Callable[[bytes], Any]], has_label: bool
) -> Callable[[bytes], dict[str, Any]]:
  """The function from a stored record to a record."""
  from tensorflow_datasets.proto import tf_example_pb2

  def parse(data: bytes) -> dict[str, Any]:
    fields = tf_example_pb2.Example.FromString(data).features.feature
    label = fields["label"].int64_list.value[0] if has_label else 0
    values = {
      key: read(fields[key].bytes_list.value[0])
      for key, read in readers.items()
    }
    return values | {"label": label}

  return parse


def _keep(record: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
  kept = {key: record[key] for key in keys}
  return kept | {"label": int(record.get("label", 0))}
