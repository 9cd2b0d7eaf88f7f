"""TensorBoard's event files in a folder or a bucket, without TensorFlow.

A file is a row of records, each an `Event`. A local file grows with every
record. An object in a bucket cannot grow, so records are held back, and go into
one new object every INTERVAL seconds and at `flush`; TensorBoard reads all
objects of a folder, in the order of their names, which begin with the time. A
kill loses what is held back: flush before a checkpoint, and a run that goes on
from it writes the rest again.
"""

import io
import itertools
import os
import socket
import time

from etils import epath
import numpy as np

from diffit_jax import pictures
from diffit_jax.run import buckets

INTERVAL = 300  # seconds between two objects


class EventWriter:
  """Scalars and images of one process, which no other writes to."""

  def __init__(self, folder: epath.Path):
    """Writes nothing yet; the folder is made where missing."""
    self._folder, self._in_bucket = folder, buckets.is_bucket(folder)
    self._counter, self._path = itertools.count(), None
    self._pending, self._flushed = [], time.monotonic()

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of one step."""
    from tensorboard.plugins.scalar import metadata

    about = metadata.create_summary_metadata(None, None)
    self._add(
      step, {name: (np.float32(x), about) for name, x in values.items()}
    )

  def images(self, step: int, name: str, grid: np.ndarray) -> None:
    """Writes uint8 [h, w, c] as one PNG."""
    from tensorboard.plugins.image import metadata

    height, width = (str(side).encode() for side in grid.shape[:2])
    about = metadata.create_summary_metadata(None, None)
    self._add(step, {name: ([width, height, pictures.to_png(grid)], about)})

  def text(self, name: str, content: str) -> None:
    """Does nothing: the file in the workdir is the one place of it."""

  def flush(self) -> None:
    """Writes what is held back."""
    if self._pending:
      mode = "wb" if self._in_bucket else "ab"
      with self._path.open(mode) as file:
        file.write(b"".join(self._pending))
    self._pending, self._flushed = [], time.monotonic()

  def close(self) -> None:
    """Writes what is held back."""
    self.flush()

  def _add(self, step: int, values: dict) -> None:
    """Adds one record with {name: (what makes a tensor, summary metadata)}."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.util import tensor_util

    if not self._pending and (self._path is None or self._in_bucket):
      self._begin_file()
    event = event_pb2.Event(wall_time=time.time(), step=step)
    for name, (value, about) in values.items():
      tensor = tensor_util.make_tensor_proto(value)
      event.summary.value.add(tag=name, tensor=tensor, metadata=about)
    self._pending.append(_record(event))
    if not self._in_bucket or time.monotonic() - self._flushed > INTERVAL:
      self.flush()

  def _begin_file(self) -> None:
    from tensorboard.compat.proto import event_pb2

    self._folder.mkdir(parents=True, exist_ok=True)
    now, host, number = time.time(), socket.gethostname(), next(self._counter)
    name = f"events.out.tfevents.{int(now):010d}.{host}.{os.getpid()}.{number}"
    self._path = self._folder / name
    first = event_pb2.Event(wall_time=now, file_version="brain.Event:2")
    self._pending.append(_record(first))


def _record(event) -> bytes:
  """One event with its length and checksums."""
  from tensorboard.summary.writer import record_writer

  buffer = io.BytesIO()
  record_writer.RecordWriter(buffer).write(event.SerializeToString())
  return buffer.getvalue()
