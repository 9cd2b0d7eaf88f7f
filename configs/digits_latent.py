"""Handwritten digits, a variation of imagenet256 that runs on a laptop.

The digits' 8x8 pixels become a 4x4 latent of 4 channels by a fixed linear code
(squares of 2x2 pixels), in place of a VAE. The same builder, hybrid loss,
guidance and 250-step respaced DDPM sampler as ImageNet. No setting of the
paper.

  python -m diffit_jax.demo --config_name=digits_latent
  python -m diffit_jax.main --config=configs/digits_latent.py

Variants, after a colon and separated by commas:
  objective=adm|flow|sit|jit  the paper's own, or flow matching
  precision=paper|bf16  float32, or bfloat16 blocks
  debug                 the same path with a small network and a few steps
"""

from ml_collections import config_dict

from configs import common, imagenet256


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  objective: common.LatentObjective = "adm",
  precision: common.Precision = "paper",
  debug: bool = False,
) -> config_dict.ConfigDict:
  config = imagenet256.base(data="images", precision=precision, debug=debug)
  config.name = "digits_latent"
  config.data.name = "digits"
  config.data.resolution = config.model.input_size = 4
  config.data.num_classes = config.model.num_classes = 10
  config.data.flip = False

  config.autoencoder.kind = "patch"  # squares of pixels become channels
  config.autoencoder.down_factor = 2
  config.autoencoder.scaling_factor = 1.0

  config.model.patch_size = 1
  config.model.remat = "none"
  config.optimizer.learning_rate = 2e-3
  config.ema.constant.decay = 0.99
  config.mesh.fsdp = 1
  config.num_threads = 2
  if not debug:
    _enlarge(config)
  common.use_flow(config, objective, common.LATENT_TIME_SCALE)
  return config


def _enlarge(config: config_dict.ConfigDict) -> None:
  config.batch_size = 128
  config.total_steps = 1_500
  config.model.hidden_dim = 64
  config.model.depth = 4
  config.model.num_heads = 4
  config.sampler.guidance_scale = 3.0
  config.sampler.guidance_schedule = "constant"
  config.sampler.guidance_channels = 0
  config.sampler.num_grid = 100
  config.log_every_steps = 100
  config.sample_every_steps = 500
  config.save_every_steps = 500
  config.keep_every_steps = 0
