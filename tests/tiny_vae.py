"""A diffusers folder with a tiny VAE of random weights."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from diffit_jax import autoencoder
from diffit_jax.interop import diffusers


def write_vae(
  folder: pathlib.Path,
  seed: int = 0,
  *,
  block_out_channels: list[int],
  latent_channels: int = 4,
  **config,
) -> pathlib.Path:
  """Divides sides by 2 per level but the last; `config` joins config.json."""
  sizes = {
    "block_out_channels": block_out_channels,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": latent_channels,
  }
  module = autoencoder.AutoencoderKL(
    **{**sizes, "block_out_channels": tuple(block_out_channels)}
  )
  rng = np.random.default_rng(seed)
  tensors = {}
  shapes = autoencoder.abstract_params(module)
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    name = diffusers.tensor_name(tuple(part.key for part in path))
    shape = diffusers._file_shape(leaf.shape)
    tensors[name] = rng.normal(0, 0.3, shape).astype(np.float32)
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(sizes | config))
  save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
  return folder
