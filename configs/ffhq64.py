"""FFHQ-64, image-space DiffiT, unconditional (DiffiT Table 2; EDM recipe).

  paper's FID   2.22 (50,000 samples, 40 Heun steps = 79 network evaluations)
  ours          not yet run
  network       44.8 M parameters, levels 64/32/16/8, 4 blocks each, window 8

  python -m diffit_jax.prepare ffhq64 --source=images1024x1024
  python -m diffit_jax.main --config=configs/ffhq64.py

Variants, after a colon and separated by commas:
  window=8|4|2     side of the attention windows (Figure 8)
  blocks=4|1-2-2-2 blocks per level: appendix H.1, or I.1
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

from configs import common


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  window: Literal[8, 4, 2] = 8,
  blocks: Literal[4, "1-2-2-2"] = 4,
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
  config = config_dict.ConfigDict()
  config.name = "ffhq64"  # and the variants; runs/<name> is the workdir
  config.seed = 0  # of initial weights, data order and every draw
  config.batch_size = 256  # images per step over all devices
  config.total_steps = 781_250  # x 256 = 200 million images, as EDM
  if duration == "iterations":
    config.total_steps = 200_000

  config.data = config_dict.ConfigDict()
  config.data.name = "ffhq64"  # folder under --data_dir
  config.data.split = "train"  # of the TFDS data set
  config.data.resolution = 64  # pixels per side
  config.data.num_classes = 0  # classes the model is told; 0 ignores labels
  config.data.flip = False  # mirror on loading; the augmentation has flips

  config.model = config_dict.ConfigDict()
  config.model.name = "image_diffit"  # the U-shaped network
  config.model.channels = 3  # of the images
  config.model.base_channels = dim // 2  # width that channel_mult multiplies
  config.model.channel_mult = (1, 2, 2, 2)  # one per level
  config.model.num_blocks = common.per_level(1 if debug else blocks)
  config.model.window_size = window  # side, in tokens
  config.model.head_dim = 64  # width of an attention head
  config.model.time_dim = time  # width of the time token
  config.model.mlp_ratio = 4  # hidden over token width
  config.model.num_classes = 0  # 0 is unconditional
  config.model.augment_dim = 9  # labels of the augmentation below
  config.model.dropout = 0.05  # rate inside the MLPs
  config.model.skip = "concat"  # concat, add or per_block
  config.model.head_act = "silu"  # silu, or none as in Figure 4
  config.model.resize = resize  # conv or bilinear
  config.model.decoder_in_conv = False  # text has it, Figure 4 does not
  config.model.time_in = time_in  # tmsa, rpb_time, mlp_time, separate or plain
  config.model.embedding = embedding  # of the noise level; or fourier
  config.model.attention = "xla"  # or cudnn, on NVIDIA, after a check
  config.model.remat = "none"  # none, dots or full: what backward recomputes
  config.model.dtype = "float32"  # of matrix products; state is float32
  config.matmul_precision = "highest"  # float32 products without TF32 or bf16
  if precision == "bf16":
    config.model.dtype = "bfloat16"
    config.matmul_precision = "default"

  config.diffusion = config_dict.ConfigDict()
  config.diffusion.kind = "edm"  # Karras et al. 2022
  config.diffusion.precond = "edm"  # or vp, ve
  config.diffusion.sigma_data = 0.5  # std of the images in [-1, 1]
  config.diffusion.P_mean = -1.2  # mean of ln sigma in training
  config.diffusion.P_std = 1.2  # its standard deviation
  config.diffusion.augment_prob = 0.15  # of each augmentation but the x-flip
  config.diffusion.label_drop_prob = 0.0  # for guidance; no labels here

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = "adam"  # adam or adamw
  config.optimizer.learning_rate = 2e-4  # after the ramp
  config.optimizer.rampup_images = 10_000_000  # linear ramp of the rate
  config.optimizer.b1 = 0.9  # decay of the first moment
  config.optimizer.b2 = 0.999  # decay of the second moment
  config.optimizer.eps = 1e-8  # added to the root of the second
  config.optimizer.weight_decay = 0.0  # decoupled; adamw only
  config.optimizer.clip_norm = 0.0  # 0 is off
  config.optimizer.sanitise_gradients = True  # NaN to 0, inf to 1e5

  config.ema = config_dict.ConfigDict()  # one entry per average, by name
  config.ema.edm = config_dict.ConfigDict()
  config.ema.edm.kind = "halflife"  # or constant, with a field decay
  config.ema.edm.halflife_images = 500_000  # images to forget one half
  config.ema.edm.rampup_ratio = 0.05  # of images seen, at the start

  config.sampler = config_dict.ConfigDict()
  config.sampler.solver = "edm_heun"  # EDM, Algorithm 2
  config.sampler.steps = 40  # 79 network evaluations
  config.sampler.guidance_scale = 1.0  # 1 is no guidance
  config.sampler.solver_options = ""  # as S_churn=40,S_noise=1.003
  config.sampler.num_grid = 64  # images of a sample grid during training

  config.mesh = config_dict.ConfigDict()
  config.mesh.data = -1  # groups that hold a copy of the state; -1 is the rest
  config.mesh.fsdp = 1  # devices that share one copy; all where fewer
  config.mesh.num_devices = 0  # that must be there; 0 for any number

  config.num_microbatches = 1  # parts of a batch, one after the other
  config.num_threads = 4  # batches decoded at the same time
  config.log_every_steps = 100  # metrics; the only waits for the device
  config.trackers = ("tensorboard",)  # of metrics; or wandb, trackio
  config.sample_every_steps = 10_000  # grid of EMA samples; 0 for none
  config.save_every_steps = 5_000  # checkpoints
  config.keep_checkpoints = 3  # newest that stay
  config.keep_every_steps = 100_000  # these stay for ever; 0 for none
  config.keep_best_by = ""  # what the best checkpoint stays by, as loss or fid
  config.evaluate_every_steps = 0  # a score of samples, as FID; 0 for none
  config.evaluation = config_dict.ConfigDict()  # see docs/evaluation.md
  config.evaluation.num = 10_000  # samples that are scored
  config.evaluation.features = "inception"  # or digits, pixels
  config.evaluation.metrics = ("fid",)  # of that space
  config.evaluation.reference = ""  # "" for the training set
  config.snapshot_every_steps = 0  # averages kept for export --ema=WIDTH
  config.watchdog_seconds = 1800  # a step this late ends the program; 0 is off

  if debug:
    config.batch_size = 8
    config.total_steps = 4
    config.model.base_channels = 16
    config.model.channel_mult = (1, 2)
    config.model.head_dim = 8
    config.model.time_dim = 32
    config.optimizer.rampup_images = 64
    config.sampler.steps = 3
    config.sampler.num_grid = 4
    config.log_every_steps = 2
    config.sample_every_steps = 4
    config.save_every_steps = 2
  common.use_flow(config, objective, common.IMAGE_TIME_SCALE)
  if ema == "power":
    common.add_power_averages(config)
  return config
