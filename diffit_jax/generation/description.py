"""What decides the samples of a network, as sampling.json and cards hold it."""

import hashlib
import json

from flax import traverse_util
import jax
import numpy as np

from diffit_jax.diffusion import kinds


def describe(weights, seed: int, labels: str, codec) -> dict:
  """The settings that decide samples; under "about" those that do not.

  Args:
    weights: `weights.Weights` of the network, with its config.
    seed: sample i depends on (seed, i).
    labels: see `labels.choose_labels`.
    codec: decodes the latents of a latent model; None for other models.
  """
  sampler = json.loads(weights.config.sampler.to_json_best_effort())
  sampler.pop("num_grid", None)
  config = json.loads(weights.config.to_json_best_effort())
  config_hash = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
  is_latent, guide = kinds.is_latent(weights.config), weights.guide
  return {
    "weights_sha256": hash_tree(weights.params),
    "step": weights.step,
    "ema": weights.ema,
    "seed": seed,
    "labels": labels,
    "sampler": sampler,
    "dtype": weights.config.model.dtype,
    "matmul_precision": weights.config.matmul_precision,
    "vae": codec.hash if codec else None,
    "guide": guide and {
      "weights_sha256": hash_tree(guide.params),
      "step": guide.step,
      "ema": guide.ema,
      "dtype": guide.config.model.dtype,
    },
    "about": {
      "config": weights.config.name,
      "data": weights.config.data.name,
      "num_classes": weights.config.model.num_classes,
      "config_sha256": config_hash.hexdigest(),
      "source": weights.source,
      "source_sha256": weights.source_sha256 or None,
      "uint8_rule": "adm" if is_latent else "edm",  # of `pictures`
      "vae_source": codec.source if codec else None,
      "guide_source": guide and guide.source,
      "guide_source_sha256": guide and (guide.source_sha256 or None),
      "jax": jax.__version__,
      "device": jax.devices()[0].device_kind,
    },
  }


def hash_tree(tree) -> str:
  """SHA-256 over names and bytes of all leaves, in order of name."""
  digest = hashlib.sha256()
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  for name in sorted(flat):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(jax.device_get(flat[name])).data)
  return digest.hexdigest()
