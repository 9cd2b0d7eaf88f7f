"""The kinds of diffusion: one table, one row per kind.

A row is a module. A new kind is such a module, and its row; if it has solvers
of its own, they are rows of `sampling.SOLVERS`. The module has

  make        `config.diffusion` -> the diffusion, see below
  FIELDS      fields of `config.diffusion` that only some kinds read
  SOLVERS     the process in `sampling.SOLVERS` whose solvers sample it
  ON_LATENTS  whether it is trained on latents where the config has a section
              `autoencoder`; else on images
  check_levels  if it is there: (`config.diffusion`, levels [n] of a solver),
              refuses levels at which the network cannot be asked

and a diffusion, for a `network` (input [b, h, w, c], level as the model is told
it [b]) -> raw output, has

  level         name of the noise level among a training step's draws
  sample_level  keys [b] -> noise levels for training [b], each of its key alone
  train_losses  (network, clean y [b, h, w, c], level [b], unit normal noise)
                -> [b]
  denoise       (network, x [b, h, w, c], level [b]) -> what its solvers are
                given
"""

from collections.abc import Mapping
import types

import numpy as np

from diffit_jax.diffusion import adm, edm, flow
from diffit_jax.errors import UserError

KINDS = {"edm": edm, "adm": adm, "flow": flow}
Diffusion = edm.Process | adm.Schedule | flow.Flow


def row(config: Mapping) -> types.ModuleType:
  """The row of `config.diffusion`."""
  kind = config["kind"]
  if kind not in KINDS:
    raise UserError(f"diffusion.kind={kind!r}: use one of {tuple(KINDS)}")
  return KINDS[kind]


def make(config: Mapping) -> Diffusion:
  """The diffusion of `config.diffusion`."""
  return row(config).make(config)


def check_levels(config: Mapping, levels: np.ndarray) -> None:
  """Refuses levels of a solver at which the network cannot be asked."""
  check = getattr(row(config), "check_levels", None)
  if check:
    check(config, levels)


def is_latent(config: Mapping) -> bool:
  """Whether the model of a whole config works on latents."""
  return row(config["diffusion"]).ON_LATENTS and "autoencoder" in config


def check_fields(config: Mapping) -> None:
  """Refuses fields of `config.diffusion` that its kind does not read."""
  own = row(config).FIELDS
  for kind, other in KINDS.items():
    found = [f for f in other.FIELDS if f not in own and config.get(f)]
    if found:
      raise UserError(
        f"diffusion.{found[0]}={config[found[0]]!r} is for"
        f" diffusion.kind={kind!r}, and this is {config['kind']!r}: leave it"
        " out"
      )
