"""Weights to sample from: a workdir's checkpoint or an exported file."""

import dataclasses
import os

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.interop import files, hub, native
from diffit_jax.parallel.sharding import replicated

RAW = "none"  # --ema=none samples from the parameters themselves
# What a guide and its network have alike, beside the kind of diffusion.
_ALIKE = (
  ("data", "resolution"),
  ("model", "channels"),
  ("model", "num_classes"),
  ("autoencoder", "kind"),
  ("autoencoder", "down_factor"),
  ("autoencoder", "scaling_factor"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters and everything that says what they are.

  Attributes:
    params: the tree, on the devices of the mesh.
    config: config of the run that made them.
    step: training steps taken.
    ema: name of the average, "none" for the raw parameters, or the relative
      width of an average that was made from snapshots.
    source: where they came from.
    about: how an average was made from snapshots, and which file of the Hub
      these come from; else empty.
    source_sha256: hash of a file that came from the Hub; else empty.
    guide: the weights that guide these (autoguidance), if any do.
  """

  params: dict
  config: config_dict.ConfigDict
  step: int
  ema: str
  source: str
  about: str = ""
  source_sha256: str = ""
  guide: "Weights | None" = None


def read_config(workdir: str | os.PathLike) -> config_dict.ConfigDict:
  """The resolved config that the run in `workdir` wrote."""
  from diffit_jax.run.workdir import path_of

  path = path_of(workdir) / "config.json"
  if not path.is_file():
    raise UserError(
      f"{workdir} holds no run ({path} is missing): train one with python -m"
      f" diffit_jax.main --config=... --workdir={workdir}"
    )
  return files.parse_config(path.read_bytes(), str(path))


def default_average(config: config_dict.ConfigDict) -> str:
  """The average that is sampled from where none is named."""
  return min(config.ema, default=RAW)


def from_workdir(
  workdir: str | os.PathLike,
  mesh: Mesh,
  ema: str | None = None,
  step: int | None = None,
) -> Weights:
  """The newest readable checkpoint's EMA (or raw) parameters.

  Args:
    workdir: folder of the run.
    mesh: the weights are replicated on it.
    ema: name of the average; None is the config's first, "none" the raw
      parameters, and a number such as "0.08" the relative width of an average
      that is made from the snapshots, at the newest of them.
    step: the checkpoint; None is the newest.
  """
  from diffit_jax.run import checkpoint

  config = read_config(workdir)
  ema = ema or default_average(config)
  if ema not in (*config.ema, RAW):
    if step is not None:
      raise UserError(
        f"step={step} goes with an average that checkpoints hold, one of"
        f" {sorted(config.ema)}: ema={ema!r} is made from all snapshots"
      )
    return _from_snapshots(workdir, mesh, config, ema)
  steps = checkpoint.list_steps(workdir)
  if not steps:
    raise UserError(
      f"{workdir} has no finished checkpoint yet: train further, a save comes"
      f" every {config.save_every_steps} steps"
    )
  if step not in (None, *steps):
    raise UserError(f"{workdir} has no checkpoint of step {step}, only {steps}")
  steps = steps if step is None else [step]
  shapes = _shapes(config, mesh)
  item, target = ("params", shapes) if ema == RAW else ("ema", {ema: shapes})
  read = lambda step: (
    step,
    checkpoint.restore_item(workdir, step, item, target),
  )
  found, failures = checkpoint.read_newest(steps, read)
  if found is None:
    reasons = "; ".join(f"{step}: {error}" for step, error in failures.items())
    raise UserError(
      f"none of the checkpoints in {workdir} can be read ({reasons}): go on"
      " with the training, which saves new ones, or use another workdir"
    )
  step, tree = found
  params = tree if ema == RAW else tree[ema]
  return Weights(params, config, step, ema, f"{workdir} step {step}")


def _shapes(config: config_dict.ConfigDict, mesh: Mesh):
  """The config's parameters, abstract and replicated."""
  place = lambda leaf: jax.ShapeDtypeStruct(
    leaf.shape, leaf.dtype, sharding=replicated(mesh)
  )
  return jax.tree.map(place, files.parameter_shapes(config))


def _from_snapshots(workdir, mesh: Mesh, config, ema: str) -> Weights:
  from diffit_jax.run import snapshots

  try:
    width = float(ema)
  except ValueError as error:
    raise UserError(
      f"ema={ema!r}: this run has {sorted(config.ema)}, or {RAW!r}, or a"
      " relative width such as 0.08"
    ) from error
  made = snapshots.reconstruct(workdir, width, _shapes(config, mesh))
  source = f"{workdir} snapshots up to step {made.step}"
  return Weights(
    made.params, config, made.step, f"{width:g}", source, made.about
  )


def from_file(
  path: str | os.PathLike,
  mesh: Mesh,
  ema: str | None = None,
  config: config_dict.ConfigDict | None = None,
) -> Weights:
  """Weights from a file: one of ours, or a released one with a config.

  Args:
    path: the .safetensors file, or its address on the Hub.
    mesh: the weights are replicated on it.
    ema: a name that the file must confirm; None is whatever it holds.
    config: config of the network and the sampler; None is the file's own.
  """
  return _from_found(hub.fetch(path), mesh, ema, config)


def _from_found(found: hub.Found, mesh: Mesh, ema, config) -> Weights:
  params, config, header = files.read_weights(found.path, config)
  if ema not in (None, header["ema"]):
    raise UserError(f"ema={ema!r}: {found.source} holds only {header['ema']!r}")
  about = [header["about"]] if header.get("about") else []
  if found.sha256:
    about.append(f"from {found.source}, SHA-256 {found.sha256}")
  return Weights(
    jax.device_put(params, replicated(mesh)),
    config,
    int(header["step"]),
    header["ema"],
    found.source,
    "; ".join(about),
    found.sha256,
  )


def load_guide(
  path: str | os.PathLike,
  mesh: Mesh,
  main: Weights,
  *,
  ema: str | None = None,
  step: int | None = None,
  flag: str = "guide",
) -> Weights:
  """Weights of a network that guides another (autoguidance).

  It may be any network of the same kind of diffusion that makes the same
  samples: a smaller one, one trained for less long, an earlier step or another
  average. One that was trained by another objective is refused: what it
  predicts belongs to other noise levels. One that was trained on latents of
  another VAE is warned of.

  Args:
    path: a workdir, a .safetensors file or the address of one on the Hub; a
      released one, which has no config of its own, is of the main network's.
    mesh: the devices.
    main: the weights that are guided.
    ema: see `from_workdir`.
    step: the checkpoint of a workdir; None is the newest.
    flag: the one that gave the path, for what is refused.

  Raises:
    UserError: no weights there, or not of a network that can guide this one.
  """
  if not (hub.is_address(path) or str(path).endswith(".safetensors")):
    found = from_workdir(path, mesh, ema, step)
  elif step is not None:
    raise UserError(f"--guide_step={step} goes with a workdir, not with {path}")
  else:
    file = hub.fetch(path)
    config = None if native.is_native(file.path) else main.config
    found = _from_found(file, mesh, ema, config)
  given = f"--{flag}={path}"
  _check_fit(given, found.config, main.config)
  _warn_of_other_latents(given, found.config, main.config)
  return found


def _check_fit(given: str, other, main) -> None:
  kinds.row(other["diffusion"])
  own, wanted = other["diffusion"]["kind"], main["diffusion"]["kind"]
  if own != wanted:
    raise UserError(
      f"{given} was trained with diffusion.kind={own!r} and this network with"
      f" {wanted!r}: both are to be trained by the same objective"
    )
  for section, field in _ALIKE:
    own, wanted = (
      config.get(section, {}).get(field) for config in (other, main)
    )
    if own != wanted:
      raise UserError(
        f"{given} has {section}.{field}={own} and this network {wanted}: both"
        " are to make the same samples"
      )


def _vae_of(config) -> str | None:
  """SHA-256 of the VAE that made the latents of a run, where it is known."""
  return config.get("data_identity", {}).get("vae_hash")


def _warn_of_other_latents(given: str, other, main) -> None:
  own, wanted = _vae_of(other), _vae_of(main)
  if None not in (own, wanted) and own != wanted:
    logging.warning(
      "%s was trained on latents of another VAE (SHA-256 %s...) than this"
      " network (%s...); they agree only where the two share their encoder",
      given,
      own[:12],
      wanted[:12],
    )


def warn_of_another_vae(config: config_dict.ConfigDict, codec) -> None:
  """Says so where the latents were not made by the VAE that decodes them."""
  trained = _vae_of(config)
  if codec is not None and trained not in (None, codec.hash):
    logging.warning(
      "the model was trained on latents of another VAE (SHA-256 %s...) than the"
      " one that decodes its samples (%s, %s...); that is right only where the"
      " two share their encoder, as sd-vae-ft-ema and -mse do",
      trained[:12],
      codec.source,
      codec.hash[:12],
    )
