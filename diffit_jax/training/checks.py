"""Refuses configs whose fields are out of range or contradict each other."""

from ml_collections import config_dict

from diffit_jax import models, ranges
from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.evaluation.metrics import table
from diffit_jax.run import ema

# Metrics of a logging point that a checkpoint can be the best by.
BEST_BY = ("loss", "grad_norm")


def check_consistent(config: config_dict.ConfigDict) -> None:
  """Refuses fields out of range, and those that do not go together."""
  ranges.check(config)
  model, diffusion = config.model, config.diffusion
  kinds.check_fields(diffusion)
  kinds.make(diffusion)  # refuses what it does not know
  names = tuple(models.NETWORKS[diffusion.kind])
  if model.name not in names:
    raise UserError(
      f"model.name={model.name!r}: use one of {names} with"
      f" diffusion.kind={diffusion.kind!r}"
    )
  network = models.make_model(model)  # refuses fields that it does not have
  if diffusion.label_drop_prob and not getattr(network, "null_label", True):
    raise UserError(
      f"diffusion.label_drop_prob={diffusion.label_drop_prob} needs a label for"
      " none, which model.null_label=False leaves out: set one of the two"
    )
  if network.num_classes not in (0, config.data.num_classes):
    raise UserError(
      f"model.num_classes={network.num_classes} must be 0 or"
      f" data.num_classes={config.data.num_classes}"
    )
  side = getattr(network, "input_size", config.data.resolution)
  if side != config.data.resolution:
    raise UserError(
      f"model.input_size={side} must be the side of the latents,"
      f" data.resolution={config.data.resolution}"
    )
  wanted = 9 if diffusion.get("augment_prob") else 0
  found = model.get("augment_dim", 0)
  if found != wanted:
    raise UserError(
      f"model.augment_dim={found} must be {wanted} with"
      f" diffusion.augment_prob={diffusion.get('augment_prob', 0)}"
    )
  _check_rest(config)


def _check_rest(config: config_dict.ConfigDict) -> None:
  """Names, and numbers that depend on another."""
  if config.keep_every_steps % config.save_every_steps:
    raise UserError(
      f"keep_every_steps={config.keep_every_steps} must be a multiple of"
      f" save_every_steps={config.save_every_steps}: no other step is saved"
    )
  precisions = ("default", "high", "highest")
  if config.matmul_precision not in precisions:
    raise UserError(
      f"matmul_precision={config.matmul_precision!r}: use one of {precisions}"
    )
  for name, rule in config.ema.items():
    if rule.kind not in ema.KINDS:
      raise UserError(
        f"ema.{name}.kind={rule.kind!r}: use one of {tuple(ema.KINDS)}"
      )
    for field in ema.KINDS[rule.kind]:
      if field not in rule:
        raise UserError(
          f"ema.{name}.kind={rule.kind!r} needs a field ema.{name}.{field},"
          f" and there is only {sorted(rule)}"
        )
  if config.snapshot_every_steps and not ema.power_averages(config.ema):
    raise UserError(
      f"snapshot_every_steps={config.snapshot_every_steps} stores averages of"
      f" kind 'power', and this config has none (only {sorted(config.ema)}):"
      " use the variant ema=power, or snapshot_every_steps=0"
    )
  distances = ()
  if config.get("evaluate_every_steps"):
    distances = filter(table.is_distance, config.evaluation.metrics)
  allowed = sorted((*BEST_BY, *distances))
  if config.keep_best_by not in ("", *allowed):
    raise UserError(
      f"keep_best_by={config.keep_best_by!r}: use one of {allowed}, or '' to"
      " keep no best checkpoint; a distance, as fid, needs evaluate_every_steps"
      " and must be among evaluation.metrics"
    )
