"""What TensorBoard reads in event files, without loading TensorFlow."""

import pathlib
import sys
import types


def read(folder: pathlib.Path) -> dict[tuple[str, str], list]:
  """{(tag, plugin): [(step, value), ..]} of the files in a folder."""
  name = "tensorboard.compat.notf"  # where it is there, TensorBoard needs none
  sys.modules.setdefault(name, types.ModuleType(name))
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  found = event_accumulator.EventAccumulator(str(folder))
  found.Reload()
  return {
    (tag, found.SummaryMetadata(tag).plugin_data.plugin_name): [
      (event.step, tensor_util.make_ndarray(event.tensor_proto).tolist())
      for event in found.Tensors(tag)
    ]
    for tag in found.Tags()["tensors"]
  }
