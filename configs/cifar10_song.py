"""CIFAR-10, a variation of cifar10: DDPM++ and NCSN++, with TMSA or without.

  paper's FID   DDPM++, VP: 3.01, with TMSA 2.76; NCSN++, VE: 3.77, with 3.49
                (DiffiT Table 5)
  ours          not yet run
  network       61.8 M (DDPM++) or 62.8 M parameters, levels 32/16/8/4

Song et al.'s recipe, as the baselines' numbers are theirs: batch 128, rate 2e-4
after 5,000 steps, gradients clipped to 1, dropout 0.1, mirror images, no other
augmentation; sampled with EDM's 18 Heun steps.
CHOICE: as many images as the other CIFAR-10 runs, which the paper leaves open;
no augmentation labels, as there is no augmentation.

  python -m diffit_jax.prepare cifar10
  python -m diffit_jax.main --config=configs/cifar10_song.py:tmsa

Variants, after a colon and separated by commas:
  network=ddpmpp|ncsnpp  with VP or with VE preconditioning
  tmsa             time in the attention, and a relative position bias
  precision=paper|bf16  float32, or bfloat16 matrix products
  debug            the same path with a small network and a few steps
"""

from typing import Literal

from ml_collections import config_dict

from configs import cifar10, common


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  network: Literal["ddpmpp", "ncsnpp"] = "ddpmpp",
  tmsa: bool = False,
  precision: common.Precision = "paper",
  debug: bool = False,
) -> config_dict.ConfigDict:
  is_vp = network == "ddpmpp"
  config = cifar10.base(precision=precision, debug=debug)
  config.name = "cifar10_song"
  config.data.flip = True

  dtype = config.model.dtype
  config.model = config_dict.ConfigDict()
  config.model.name = "song_unet"
  config.model.channels = 3
  config.model.base_channels = 128  # width that channel_mult multiplies
  config.model.channel_mult = (1, 2, 2, 2)  # one per level
  config.model.num_blocks = 4  # per level; the decoder has one more
  config.model.attention_sides = (16,)  # of the maps with attention
  config.model.pyramid = not is_vp  # NCSN++
  config.model.tmsa = tmsa  # time in the attention
  config.model.num_classes = 0  # 0 is unconditional
  config.model.augment_dim = 0  # nothing is augmented
  config.model.dropout = 0.1  # rate in each block
  config.model.dtype = dtype
  config.model.remat = "none"  # none, dots or full: what backward recomputes

  config.diffusion.precond = "vp" if is_vp else "ve"
  config.diffusion.augment_prob = 0.0

  config.optimizer.learning_rate = 2e-4
  config.optimizer.rampup_images = 640_000  # 5,000 steps
  config.optimizer.clip_norm = 1.0
  config.ema = config_dict.ConfigDict()
  config.ema.constant = config_dict.ConfigDict()
  config.ema.constant.kind = "constant"
  config.ema.constant.decay = 0.9999 if is_vp else 0.999

  if not is_vp:
    config.sampler.solver_options = "sigma_min=0.02"  # the least VE has seen
  if debug:
    config.model.base_channels = 16
    config.model.channel_mult = (1, 2)
    config.model.num_blocks = 1
    config.optimizer.rampup_images = 64
  else:
    config.batch_size = 128
    config.total_steps = 1_562_500  # x 128 = 200 million images
  return config
