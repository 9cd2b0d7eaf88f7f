"""CIFAR-10, image-space DiffiT, unconditional (DiffiT Table 2; EDM recipe).

  paper's FID   1.95 (50,000 samples, 18 Heun steps = 35 network evaluations)
  ours          not yet run
  network       15.9 M parameters, levels 32/16/8, 2 blocks each, window 4

  python -m diffit_jax.prepare cifar10
  python -m diffit_jax.main --config=configs/cifar10.py

Variants, after a colon and separated by commas:
  window=4|2|8     side of the attention windows (Figure 8)
  blocks=2|4       blocks per level: appendix I.1, or H.1
  width=1-2-2|2-2-2  channel multipliers: appendix I.1, or EDM's
  rung=E|A|B|C|D   of the architecture ladder; E is DiffiT (Table 4)
  dim=256|512      width of the tokens (Table 3)
  time=512|256     width of the time token (Table 3)
  time_in=tmsa|rpb_time|mlp_time|separate|plain  where time enters (Tables 6, 7)
  embedding=positional|fourier  of the noise level (Table 8)
  resize=conv|bilinear  between levels (appendix I.1)
  precision=paper|bf16  float32 as in the paper, or bfloat16 matrix products
  duration=edm|iterations  200 million images (EDM), or 200,000 steps (I.1)
  ema=one|power    the average below, or two more for export --ema=WIDTH
  debug            the same path with a small network and a few steps
"""

from ml_collections import config_dict

from configs import common, ffhq64


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  variant = common.parse_arg(
    arg,
    window=(4, 2, 8),
    blocks=(2, 4),
    width=("1-2-2", "2-2-2"),
    rung=("E", "A", "B", "C", "D"),
    **common.IMAGE_NETWORKS,
    precision=("paper", "bf16"),
    duration=("edm", "iterations"),
    ema=("one", "power"),
    debug=(False, True),
  )
  passed_on = ("precision", "duration", *common.IMAGE_NETWORKS)
  config = ffhq64.get_config(
    ",".join(f"{name}={getattr(variant, name)}" for name in passed_on)
    + (",debug" if variant.debug else "")
  )
  config.name = common.run_name("cifar10", arg)

  config.data.name = "cifar10"  # TFDS's own builder; labels are ignored
  config.data.resolution = 32

  config.model.channel_mult = common.blocks(variant.width)
  config.model.window_size = variant.window
  if variant.rung != "E":
    config.model.name = "ladder"
    config.model.rung = variant.rung
    config.model.vit_dim = 768  # of rung A, and so on
    config.model.vit_depth = 12
    config.model.vit_heads = 12
    config.model.patch_size = 4
  config.model.dropout = 0.13
  config.diffusion.augment_prob = 0.12
  config.optimizer.learning_rate = 1e-3
  config.sampler.steps = 18  # 35 network evaluations
  if variant.debug:
    config.model.channel_mult = (1, 2)
    if variant.rung != "E":
      config.model.vit_dim = 16
      config.model.vit_depth = 4
      config.model.vit_heads = 2
    config.sampler.steps = 3
  else:
    config.model.num_blocks = variant.blocks
    config.batch_size = 512
    if variant.duration == "edm":
      config.total_steps = 390_625  # x 512 = 200 million images
  if variant.ema == "power":
    common.add_power_averages(config)
  return config
