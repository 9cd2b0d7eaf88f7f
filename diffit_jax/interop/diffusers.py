"""The SD VAE as diffusers stores it: `config.json` and one safetensors file.

A tensor `encoder.down_blocks.0.resnets.1.conv1.weight` of the file is the
parameter `encoder/down_blocks_0/resnets_1/conv1/kernel` of our tree, with the
axes (out, in, h, w) or (out, in) turned into (h, w, in, out) or (in, out).

Old files, those of sd-vae-ft-ema and -mse among them, call the attention's
maps query, key, value and proj_attn; still older ones keep them as 1x1
convolutions (c, c, 1, 1). All of these are read. Every tensor of the file must
be used, and used once.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import re
import shlex

from absl import logging
from flax import traverse_util
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.interop import tensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The same network in another type; diffusers' `variant` of these names.
_VARIANTS = ("fp16", "bf16")

_OLD_ATTENTION_NAMES = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}
_OLD_ATTENTION = re.compile(
  r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)"
)

# Sizes of the network, with diffusers' defaults.
_SIZES = {
  "in_channels": 3,
  "out_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 32,
}
_DEFAULT_SCALING_FACTOR = 0.18215

# What the network is built for; another value would need another network.
_ONLY = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "mid_block_add_attention": True,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
}
_BLOCK_TYPES = {
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}
# Says nothing about the network in float32.
_IGNORED = ("sample_size", "force_upcast")


def find_files(
  directory: str | os.PathLike,
) -> tuple[pathlib.Path, pathlib.Path]:
  """The config and the weights in a diffusers folder.

  Where the weights are there in half precision alone, these are taken.

  Raises:
    UserError: no such folder, a file is missing, the weights are split over
      several files, or only a pickle is there.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(
      f"{directory} is not a folder: give a diffusers VAE folder with"
      f" {CONFIG} and {WEIGHTS}"
    )
  config, weights = directory / CONFIG, _find_weights(directory)
  for path in (config, weights):
    if path.is_file():
      continue
    if (directory / "vae" / path.name).is_file():
      raise UserError(
        f"{path} is not there: {directory} looks like a whole pipeline, give"
        f" its VAE {directory / 'vae'}"
      )
    pickles = sorted(
      p for p in directory.iterdir() if p.suffix in tensors.PICKLE_SUFFIXES
    )
    if path == weights and list(directory.glob(f"{WEIGHTS}.index*.json")):
      raise UserError(_refuse_shards(directory))
    if path == weights and pickles:
      raise UserError(tensors.refuse_pickle(pickles[0], weights))
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:10])
    raise UserError(
      f"{path} is not there (found: {found or 'nothing'}): give a diffusers"
      f" VAE folder with {CONFIG} and {WEIGHTS}"
    )
  return config, weights


def _find_weights(directory: pathlib.Path) -> pathlib.Path:
  """The file of weights that is there, or where it would be."""
  weights = directory / WEIGHTS
  if not weights.is_file():
    for variant in _VARIANTS:
      path = weights.with_suffix(f".{variant}.safetensors")
      if path.is_file():
        logging.info("%s is not there: reading %s", weights, path.name)
        return path
  return weights


def _refuse_shards(directory: pathlib.Path) -> str:
  """Why, and the command that joins the files where diffusers is installed."""
  joined = f"{directory.resolve()}-unsharded"
  return (
    f"the weights in {directory} are split over several files, which are not"
    ' read: save unsharded where diffusers is installed: python -c "import'
    " sys; from diffusers import AutoencoderKL as A;"
    " A.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2],"
    f" max_shard_size='100GB')\" {shlex.quote(str(directory))}"
    f" {shlex.quote(joined)}"
  )


def read_autoencoder_config(
  path: str | os.PathLike,
) -> tuple[dict[str, int | tuple[int, ...]], float]:
  """Reads the sizes of an AutoencoderKL from its `config.json`.

  Returns:
    Keyword arguments for `autoencoder.AutoencoderKL`, and the scaling factor.

  Raises:
    UserError: not JSON, a size makes no sense, or a field asks for a network
      other than the SD VAE's.
  """
  try:
    config = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} is not a readable JSON file: {error}") from error
  if not isinstance(config, dict) or "block_out_channels" not in config:
    raise UserError(
      f"{path} is not the config of an AutoencoderKL: no block_out_channels"
    )
  widths = config["block_out_channels"]
  if not isinstance(widths, list) or not widths:
    raise UserError(f"{path}: block_out_channels={widths!r} must be a list")
  sizes = {name: config.get(name, value) for name, value in _SIZES.items()}
  scaling_factor = config.get("scaling_factor", _DEFAULT_SCALING_FACTOR)
  problems = _unsupported(config, len(widths))
  problems += [
    f"{name}={value!r} must be a positive whole number"
    for name, value in [
      *sizes.items(),
      *(("block_out_channels", w) for w in widths),
    ]
    if type(value) is not int or value < 1
  ]
  if type(scaling_factor) not in (int, float) or not (
    0 < scaling_factor < math.inf
  ):
    problems.append(f"{scaling_factor=} must be a positive number")
  if not problems:
    groups = sizes["norm_num_groups"]
    problems = [
      f"norm_num_groups={groups} must divide block_out_channels={widths}"
      for width in widths
      if width % groups
    ][:1]
  if problems:
    raise UserError(f"{path}: {'; '.join(problems)}")
  return {**sizes, "block_out_channels": tuple(widths)}, float(scaling_factor)


def _unsupported(config: Mapping, num_levels: int) -> list[str]:
  """Names every field whose value asks for another network."""
  problems = [
    f"{name}={config[name]!r} is not supported, only {value!r}"
    for name, value in _ONLY.items()
    if config.get(name, value) != value
  ]
  for name, block in _BLOCK_TYPES.items():
    blocks = config.get(name, [block] * num_levels)
    if blocks != [block] * num_levels:
      problems.append(
        f"{name}={blocks!r} is not supported, only {num_levels} times"
        f" {block!r}, one for each of block_out_channels"
      )
  known = {*_SIZES, *_ONLY, *_BLOCK_TYPES, *_IGNORED}
  known |= {"block_out_channels", "scaling_factor"}
  problems += [
    f"{name}={value!r} is not a known field"
    for name, value in config.items()
    if name not in known and not name.startswith("_") and value is not None
  ]
  return problems


def tensor_name(path: tuple[str, ...]) -> str:
  """The file's name for a parameter: ("mid_block", "resnets_0", ...)."""
  *modules, leaf = path
  leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
  return ".".join([*(re.sub(r"_(\d+)$", r".\1", m) for m in modules), leaf])


def _new_name(name: str) -> str:
  """Today's name of a tensor that may carry one of the old names."""
  match = _OLD_ATTENTION.fullmatch(name)
  if not match:
    return name
  module, old, leaf = match.groups()
  return f"{module}.{_OLD_ATTENTION_NAMES[old]}.{leaf}"


def _file_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """A parameter's shape as the file stores it: outputs first, then inputs."""
  return tuple(shape[i] for i in _file_axes(len(shape)))


def _file_axes(ndim: int) -> tuple[int, ...]:
  return {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[ndim]


def read_autoencoder_weights(
  path: str | os.PathLike, expected: Mapping
) -> dict:
  """Reads the file, one tensor at a time, into the tree of `expected`.

  Args:
    path: safetensors file of any floating type.
    expected: nested dict of anything with a shape, such as the result of
      `jax.eval_shape` on the module's `init`.

  Returns:
    Nested dict of float32 numpy arrays.

  Raises:
    UserError: not a whole safetensors file; or tensors are missing, unknown,
      there twice or of another shape, all of them listed.
  """
  wanted = {
    tensor_name(p): (p, tuple(leaf.shape))
    for p, leaf in traverse_util.flatten_dict(dict(expected)).items()
  }
  with tensors.open_file(path) as file:
    stored = {}
    for name in file.keys():
      header = file.get_slice(name)
      stored[name] = (tuple(header.get_shape()), header.get_dtype())
    _check_tensors(path, stored, {k: s for k, (_, s) in wanted.items()})
    flat = {}
    for name in stored:
      location, shape = wanted[_new_name(name)]
      array = tensors.read_float32(file, name).reshape(_file_shape(shape))
      axes = np.argsort(_file_axes(len(shape)))
      flat[location] = np.ascontiguousarray(array.transpose(axes))
  return traverse_util.unflatten_dict(flat)


def _check_tensors(
  path: str | os.PathLike,
  stored: Mapping[str, tuple[tuple[int, ...], str]],
  wanted: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises a UserError that lists every tensor that does not fit."""
  names = {}
  for name in sorted(stored):
    names.setdefault(_new_name(name), []).append(name)
  problems = [
    f"missing {name}" for name in sorted(wanted.keys() - names.keys())
  ]
  for new, found in names.items():
    if new not in wanted:
      problems.append(f"unknown {found[0]}")
    elif len(found) > 1:
      problems.append(f"twice, as {' and '.join(found)}")
    else:
      name, shape = found[0], _file_shape(wanted[new])
      found_shape, dtype = stored[name]
      old_shape = (*shape, 1, 1) if len(shape) == 2 else shape
      if found_shape not in (shape, old_shape):
        problems.append(f"{name} is {found_shape} instead of {shape}")
      elif wrong := tensors.wrong_type(name, dtype):
        problems.append(wrong)
  if problems:
    raise UserError(
      f"{path} does not fit its {CONFIG}: {'; '.join(problems[:20])}"
      + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
    )
