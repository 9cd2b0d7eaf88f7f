"""Weights from a file, whichever of the two layouts it has.

Our own files carry their config; the released ones describe only the network,
which must then be the one that a given config describes.
"""

from collections.abc import Mapping
import json
import os

from absl import logging
import jax
from ml_collections import config_dict
import numpy as np

from diffit_jax import models
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.interop import hub, native, official
from diffit_jax.models import latent
from diffit_jax.models.compute import AUTO

_SIZES = (
  "input_size",
  "patch_size",
  "channels",
  "hidden_dim",
  "depth",
  "num_heads",
  "mlp_ratio",
  "num_classes",
  "learn_sigma",
)

# Without these, no network and no sampler can be made of a config.
_SECTIONS = ("model", "data", "diffusion", "sampler", "matmul_precision")


def read_weights(
  path: str | os.PathLike, config: config_dict.ConfigDict | None = None
) -> tuple[dict, config_dict.ConfigDict, dict[str, str]]:
  """Reads parameters and the config that they belong to.

  Args:
    path: a .safetensors file that `export` wrote, or a released one.
    config: needed for a released file; replaces the config of one of ours.

  Returns:
    (params as numpy arrays, config, {"step": .., "ema": ..}).

  Raises:
    UserError: not such a file, or not of the config's network; says what
      differs, with both values.
  """
  if native.is_native(path):
    params, own, header = _read_native(path)
    config = own if config is None else config
    native.check_tree(params, parameter_shapes(config), path)
    return params, config, header
  model, params = official.load_official(path)
  if config is None:
    raise UserError(
      f"{path} is in the released layout, which carries no config: give one,"
      " as --config=configs/imagenet256.py"
    )
  _check_sizes(path, model, config)
  if not config.model.scan_blocks:
    params = latent.unstack_blocks(params)
  return params, config, {"step": "0", "ema": "released"}


def read_initial(
  path: str | os.PathLike, config: config_dict.ConfigDict
) -> dict:
  """Parameters to start a training run from.

  A latent model may come from another resolution: its bias tables are then
  resized, and the positions are computed anew in any case. The file may be on
  the Hub.
  """
  found = hub.fetch(path)
  if found.sha256:
    logging.info("starting from %s, SHA-256 %s", found.source, found.sha256)
  path = found.path
  if native.is_native(path):
    params, own, _ = _read_native(path)
    from_side = own.data.resolution
    if own.model.name == config.model.name == "latent_diffit":
      _check_sizes(
        path, models.make_model(own.model), config, ignore=("input_size",)
      )
  else:
    model, params = official.load_official(path)
    from_side = model.input_size
    _check_sizes(path, model, config, ignore=("input_size",))
  if config.model.name == "latent_diffit":
    to_side = config.model.input_size
    if from_side != to_side:
      params = latent.resize_params(params, from_side, to_side)
    stacked = latent.STACKED in params
    if stacked and not config.model.scan_blocks:
      params = latent.unstack_blocks(params)
    elif not stacked and config.model.scan_blocks:
      params = latent.stack_blocks(params)
  native.check_tree(params, parameter_shapes(config), path)
  return params


def parse_config(text: str | bytes, where: str) -> config_dict.ConfigDict:
  """A config from its JSON.

  Args:
    text: as a workdir or the header of a file keeps it.
    where: it stands, for the error message.

  Raises:
    UserError: no JSON, or not of a config.
  """
  try:
    config = json.loads(text)
  except ValueError as error:
    raise UserError(f"{where} is damaged: it is no JSON ({error})") from error
  if not isinstance(config, dict):
    raise UserError(f"{where} is damaged: it is no config, but {config!r:.40}")
  missing = [section for section in _SECTIONS if section not in config]
  if missing:
    raise UserError(f"{where} is no config: it lacks {', '.join(missing)}")
  return config_dict.ConfigDict(config)


def _read_native(path) -> tuple[dict, config_dict.ConfigDict, dict[str, str]]:
  params, header = native.load(path)
  config = parse_config(header["config"], f"the config in the header of {path}")
  return params, config, header


def write_weights(
  path: str | os.PathLike,
  params: Mapping,
  config: config_dict.ConfigDict,
  *,
  step: int,
  ema: str,
  about: str = "",
  layout: str = "native",
) -> None:
  """Writes parameters in the "native" or the "official" layout.

  Args:
    path: ends in .safetensors.
    params: tree of arrays of the config's network.
    config: config of the network and the sampler.
    step: training steps taken.
    ema: name of the average, "none" for raw parameters, or a width.
    about: one line for the header on how the average was made, where it was
      made after training.
    layout: only latent models have the official one.
  """
  if layout == "native":
    header = {
      "config": config.to_json_best_effort(),
      "step": str(step),
      "ema": ema,
      **({"about": about} if about else {}),
    }
    native.save(path, params, header)
    return
  if config.model.name != "latent_diffit":
    raise UserError(
      f"model.name={config.model.name!r} has no official layout: the release"
      " holds the latent model only; use --layout=native"
    )
  params = jax.tree.map(np.asarray, params)
  official.save_official(path, models.make_model(config.model), params)


def parameter_shapes(config: Mapping) -> dict:
  """Abstract parameters of a config's network."""
  model = models.make_model(config["model"]).clone(attention=AUTO)
  side = config["data"]["resolution"]
  x = jax.ShapeDtypeStruct((1, side, side, model.channels), "float32")
  time = jax.ShapeDtypeStruct((1,), "float32")
  key = jax.eval_shape(lambda: jax.random.key(0, impl=PRNG))
  return jax.eval_shape(model.init, key, x, time)["params"]


def _check_sizes(path, model, config: Mapping, ignore: tuple = ()) -> None:
  if config["model"]["name"] != "latent_diffit":
    raise UserError(
      f"{path} holds a latent model, and the config's model.name is"
      f" {config['model']['name']!r}: use configs/imagenet256.py or 512"
    )
  wanted = models.make_model(config["model"])
  different = [
    f"{field} is {getattr(model, field)} there and {getattr(wanted, field)} in"
    " the config"
    for field in _SIZES
    if field not in ignore and getattr(model, field) != getattr(wanted, field)
  ]
  if different:
    raise UserError(f"{path} is of another network: {'; '.join(different)}")
