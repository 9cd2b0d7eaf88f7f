"""Made-up weights of the FID Inception, and a file of them."""

import os

import numpy as np
from safetensors.numpy import save_file

from diffit_jax.evaluation.features import inception_weights
from goldens import hfill


def fill() -> dict[str, np.ndarray]:
  """Every tensor of a file, float64, as the known features were made with."""
  state = {}
  for key, shape in inception_weights.expected_shapes().items():
    if key.endswith("conv.weight"):
      state[key] = hfill(key, shape, (6 / np.prod(shape[1:])) ** 0.5)
    elif key.endswith("running_var"):
      state[key] = 1 + hfill(key, shape, 0.3)
    elif key.endswith("bn.weight"):
      state[key] = 1 + hfill(key, shape, 0.1)
    else:
      state[key] = hfill(key, shape, 0.05 if key == "fc.weight" else 0.1)
  return state


def write(path: str | os.PathLike, state=None) -> str:
  """Writes them in float32, with the counters that PyTorch writes."""
  state = state or fill()
  tensors = {key: array.astype(np.float32) for key, array in state.items()}
  for key in state:
    if key.endswith("running_var"):
      counter = key.replace("running_var", "num_batches_tracked")
      tensors[counter] = np.zeros((), np.int64)
  save_file(tensors, path)
  return os.fspath(path)
