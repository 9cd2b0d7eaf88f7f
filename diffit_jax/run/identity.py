"""What makes two starts one run: the fields of a config that decide it."""

from collections.abc import Mapping
import json

from ml_collections import config_dict

from diffit_jax import settings

# What decides a run's numbers. Mesh, logging, intervals, sampler and total
# steps may change from one start to the next.
FIXED = (
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

# Fields that came later, with what runs before them had in their place.
ADDED = (
  ("model", "time_in", "tmsa"),
  ("model", "embedding", "positional"),
  ("diffusion", "precond", "edm"),
)

# How the model is computed, but for rounding not what.
FREE_IN_MODEL = ("remat", "attention")

DATA = "data_identity"  # key of config.json: what the data set really was


def resolve(config: config_dict.ConfigDict, data: Mapping | None) -> dict:
  """The config as JSON holds it, with what identifies the data set."""
  resolved = json.loads(config.to_json_best_effort())
  return resolved if data is None else resolved | {DATA: dict(data)}


def fixed_fields(resolved: Mapping) -> dict:
  """The fields of a resolved config that must stay from start to start."""
  fixed = {field: resolved.get(field) for field in FIXED}
  model = fixed["model"] or {}
  fixed["model"] = {k: v for k, v in model.items() if k not in FREE_IN_MODEL}
  return fixed


def differences(old: Mapping, new: Mapping) -> list[str]:
  """["model.dropout is 0.1 there and 0.2 here", ..] of two resolved configs.

  Args:
    old: config that a run was begun with, of this or an earlier version.
    new: config that it is to go on with; the data sets are compared where it
      says what its own is.
  """
  fixed_old, fixed_new = fixed_fields(old), fixed_fields(new)
  for section, field, value in ADDED:
    if fixed_old[section] is not None and field in fixed_new[section]:
      fixed_old[section].setdefault(field, value)
  if new.get(DATA):
    fixed_old[DATA], fixed_new[DATA] = old.get(DATA), new[DATA]
  return settings.differences(fixed_old, fixed_new)
