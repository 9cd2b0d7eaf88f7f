"""Handwritten digits, a variation of ffhq64: class-conditional, the demo.

The 1,797 digits of scikit-learn (8x8 gray, 10 classes) through the same
builder, pipeline, step, EMA, checkpoint and sampler as FFHQ-64, in
minutes on a laptop.
No setting of the paper. `make demo` runs it and prints what it reached.

  python -m diffit_jax.prepare digits
  python -m diffit_jax.main --config=configs/digits.py

Variants, after a colon and separated by commas:
  window=4|2|8     side of the attention windows on the 8x8 level
  blocks=1|2       blocks per level
  time_in=tmsa|rpb_time|mlp_time|separate|plain  where time enters
  embedding=positional|fourier  of the noise level
  objective=edm|flow|sit|jit  the paper's own, or flow matching
  precision=paper|bf16  float32, or bfloat16 matrix products
  ema=one|power    the average below, or two more for export --ema=WIDTH
  debug            the same path with a network of one level and a few steps
"""

from typing import Literal

from ml_collections import config_dict

from configs import common, ffhq64


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  window: Literal[4, 2, 8] = 4,
  blocks: Literal[1, 2] = 1,
  time_in: common.TimeIn = "tmsa",
  embedding: common.Embedding = "positional",
  objective: common.ImageObjective = "edm",
  precision: common.Precision = "paper",
  ema: common.Averages = "one",
  debug: bool = False,
) -> config_dict.ConfigDict:
  config = ffhq64.base(
    time_in=time_in, embedding=embedding, precision=precision
  )
  config.name = "digits"
  config.batch_size = 128
  config.total_steps = 750

  config.data.name = "digits"
  config.data.resolution = 8
  config.data.num_classes = 10

  config.model.channels = 1
  config.model.base_channels = 32
  config.model.channel_mult = (1, 2)
  config.model.num_blocks = blocks
  config.model.window_size = window
  config.model.head_dim = 16
  config.model.time_dim = 128
  config.model.num_classes = 10
  config.model.augment_dim = 0  # mirrored or turned digits are other signs
  config.model.dropout = 0.0

  config.diffusion.augment_prob = 0.0
  config.diffusion.label_drop_prob = 0.1

  config.optimizer.learning_rate = 2e-3
  config.optimizer.rampup_images = 6_400
  config.ema.edm.halflife_images = 5_000

  config.sampler.steps = 18
  config.sampler.guidance_scale = 1.5
  config.sampler.num_grid = 100

  config.num_threads = 2
  config.log_every_steps = 50
  config.sample_every_steps = 250
  config.save_every_steps = 250
  config.keep_every_steps = 0

  config.evaluation.num = 500
  config.evaluation.features = "digits"  # a small classifier's, no FID
  config.evaluation.metrics = ("frechet_digits",)

  if debug:
    config.batch_size = 16
    config.total_steps = 4
    config.model.channel_mult = (1,)
    config.model.base_channels = 8
    config.model.head_dim = 8
    config.model.time_dim = 16
    config.sampler.steps = 3
    config.sampler.num_grid = 10
    config.log_every_steps = 2
    config.sample_every_steps = 4
    config.save_every_steps = 2
  common.use_flow(config, objective, common.IMAGE_TIME_SCALE)
  if ema == "power":
    common.add_power_averages(config)
  return config
