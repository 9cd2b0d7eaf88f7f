"""The folder of a run: its config, and whether a config may continue it."""

import json
import os
import pathlib

from ml_collections import config_dict

from diffit_jax.errors import UserError

# What decides a run's numbers. Mesh, logging, intervals, sampler and total
# steps may change from one start to the next.
_FIXED = (
  "seed",
  "batch_size",
  "data",
  "autoencoder",
  "model",
  "matmul_precision",
  "diffusion",
  "optimizer",
  "ema",
)


def claim(workdir: str | os.PathLike, config: config_dict.ConfigDict) -> None:
  """Writes `config.json`, or checks that the one there is of the same run.

  Raises:
    UserError: the folder holds another run; names the fields that differ.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  new = json.loads(config.to_json_best_effort())
  if path.exists():
    try:
      old = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(
        f"{path} is damaged ({error}): delete it if the run's config is the"
        " one given now, or use another --workdir"
      ) from error
    different = _differences(
      {field: old.get(field) for field in _FIXED},
      {field: new.get(field) for field in _FIXED},
    )
    if different:
      raise UserError(
        f"{workdir} holds another run: {'; '.join(different[:10])}; use"
        " another --workdir, or the run's own config"
      )
  elif (workdir / "checkpoints").is_dir() and any(
    (workdir / "checkpoints").iterdir()
  ):
    raise UserError(
      f"{workdir} holds checkpoints but no config.json: use another --workdir"
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)
  except OSError as error:
    raise UserError(
      f"cannot write to the workdir {workdir}: {error}"
    ) from error


def _differences(old, new, path: str = "") -> list[str]:
  """["model.dropout is 0.1 there and 0.2 here", ..] for unequal leaves."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      text
      for key in sorted(old.keys() | new.keys())
      for text in _differences(
        old.get(key), new.get(key), f"{path}.{key}" if path else key
      )
    ]
  return [] if old == new else [f"{path} is {old!r} there and {new!r} here"]
