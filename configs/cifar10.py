"""CIFAR-10, a variation of ffhq64: unconditional DiffiT (Table 2; EDM recipe).

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
  objective=edm|flow|sit|jit  the paper's own, or flow matching
  precision=paper|bf16  float32 as in the paper, or bfloat16 matrix products
  duration=edm|iterations  200 million images (EDM), or 200,000 steps (I.1)
  ema=one|power    the average below, or two more for export --ema=WIDTH
  debug            the same path with a small network and a few steps
"""

from typing import Literal

from ml_collections import config_dict

from configs import common, ffhq64


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  window: Literal[4, 2, 8] = 4,
  blocks: Literal[2, 4] = 2,
  width: Literal["1-2-2", "2-2-2"] = "1-2-2",
  rung: Literal["E", "A", "B", "C", "D"] = "E",
  dim: Literal[256, 512] = 256,
  time: Literal[512, 256] = 512,
  time_in: common.TimeIn = "tmsa",
  embedding: common.Embedding = "positional",
  resize: Literal["conv", "bilinear"] = "conv",
  objective: common.ImageObjective = "edm",
  precision: common.Precision = "paper",
  duration: Literal["edm", "iterations"] = "edm",
  ema: common.Averages = "one",
  debug: bool = False,
) -> config_dict.ConfigDict:
  config = ffhq64.base(
    dim=dim,
    time=time,
    time_in=time_in,
    embedding=embedding,
    resize=resize,
    precision=precision,
    duration=duration,
    debug=debug,
  )
  config.name = "cifar10"

  config.data.name = "cifar10"  # TFDS's own builder; labels are ignored
  config.data.resolution = 32

  config.model.channel_mult = common.per_level(width)
  config.model.window_size = window
  if rung != "E":
    config.model.name = "ladder"
    config.model.rung = rung
    config.model.vit_dim = 768  # of rung A, and so on
    config.model.vit_depth = 12
    config.model.vit_heads = 12
    config.model.patch_size = 4
  config.model.dropout = 0.13
  config.diffusion.augment_prob = 0.12
  config.optimizer.learning_rate = 1e-3
  config.sampler.steps = 18  # 35 network evaluations
  if debug:
    config.model.channel_mult = (1, 2)
    if rung != "E":
      config.model.vit_dim = 16
      config.model.vit_depth = 4
      config.model.vit_heads = 2
    config.sampler.steps = 3
  else:
    config.model.num_blocks = blocks
    config.batch_size = 512
    if duration == "edm":
      config.total_steps = 390_625  # x 512 = 200 million images
  common.use_flow(config, objective, common.IMAGE_TIME_SCALE)
  if ema == "power":
    common.add_power_averages(config)
  return config
