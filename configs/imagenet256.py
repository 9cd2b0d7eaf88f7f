"""ImageNet-256, latent DiffiT, class-conditional (DiffiT Tables 1 and 9).

  paper         FID 1.73, IS 276.49, precision 0.80, recall 0.62
                (50,000 samples, 250 DDPM steps, power-cosine guidance)
  ours          not yet run
  network       561.0 M parameters + 0.3 M fixed positions, 28 blocks of 1152

  python -m diffit_jax.prepare imagenet_latents --source=IMAGENET/train \
      --vae=sd-vae-ft-ema --resolution=256 --name=imagenet256_latents
  python -m diffit_jax.main --config=configs/imagenet256.py
  python -m diffit_jax.sample --checkpoint=diffit_256.safetensors \
      --config=configs/imagenet256.py --vae=sd-vae-ft-ema --out=samples

Variants, after a colon and separated by commas:
  depth=28|paper_text   blocks: Table 9 and the released weights, or H.2's 30
  modulation=tmsa|dit   where time enters; DiT's as a baseline (Figure 7b)
  duration=long|figure7b  7 million steps, as DiT, or the figure's 1 million
  guidance=4.4|4.6      the release's README, or the paper's text
  data=latents|images   from prepared latents, or encoded on the fly (--vae)
  objective=adm|flow|sit|jit  the paper's own, or flow matching
  precision=bf16|paper  bfloat16 blocks, or float32
  ema=one|power         the average below, or two more for export --ema=WIDTH
  debug                 the same path with a small network and a few steps
"""

from typing import Literal

from ml_collections import config_dict

from configs import common


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  depth: Literal[28, "paper_text"] = 28,
  modulation: Literal["tmsa", "dit"] = "tmsa",
  duration: Literal["long", "figure7b"] = "long",
  guidance: Literal[4.4, 4.6] = 4.4,
  data: Literal["latents", "images"] = "latents",
  objective: common.LatentObjective = "adm",
  precision: Literal["bf16", "paper"] = "bf16",
  ema: common.Averages = "one",
  debug: bool = False,
) -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.name = "imagenet256"  # and the variants; runs/<name> is the workdir
  config.seed = 0  # of initial weights, data order and every draw
  config.batch_size = 256  # images per step over all devices
  config.total_steps = 7_000_000  # the paper does not say; DiT's length
  if duration == "figure7b":
    config.total_steps = 1_000_000
  config.init_from = ""  # .safetensors to start from, released or exported

  config.data = config_dict.ConfigDict()
  config.data.name = "imagenet256_latents"  # folder under --data_dir
  config.data.split = "train"  # of the TFDS data set
  config.data.content = data  # latents, or images to encode
  config.data.resolution = 32  # side of a latent: pixels / 8
  config.data.num_classes = 1000  # that the model is told
  config.data.flip = True  # the mirror image's latent half of the time
  if data == "images":
    config.data.name = "imagenet256"  # prepare image_folder --crop=adm

  config.autoencoder = config_dict.ConfigDict()
  config.autoencoder.kind = "sd_vae"  # its folder is the flag --vae
  config.autoencoder.down_factor = 8  # pixels per latent position and side
  config.autoencoder.scaling_factor = 0.18215  # latents are multiplied by it

  config.model = config_dict.ConfigDict()
  config.model.name = "latent_diffit"  # the flat transformer
  if modulation == "dit":
    config.model.name = "dit"  # the same with DiT's modulation
  config.model.input_size = 32  # side of a latent
  config.model.patch_size = 2  # side of the squares that become tokens
  config.model.channels = 4  # of a latent
  config.model.hidden_dim = 1152  # width of the tokens
  config.model.depth = 28 if depth == 28 else 30
  config.model.num_heads = 16  # 72 wide
  config.model.mlp_ratio = 4  # hidden over token width
  config.model.num_classes = 1000  # one more row is "no class"
  config.model.learn_sigma = True  # twice the output channels
  config.model.dtype = "bfloat16"  # of the blocks; state is float32
  config.model.attention = "auto"  # fused where a check allows it, else xla
  config.model.remat = "dots"  # none, dots or full: what backward recomputes
  config.model.scan_blocks = True  # one compiled block for all
  config.matmul_precision = "default"  # of float32 products
  if precision == "paper":
    config.model.dtype = "float32"
    config.matmul_precision = "highest"

  config.diffusion = config_dict.ConfigDict()
  config.diffusion.kind = "adm"  # Dhariwal and Nichol 2021
  config.diffusion.num_steps = 1000  # of the training schedule
  config.diffusion.label_drop_prob = 0.1  # for guidance

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = "adamw"  # adam or adamw
  config.optimizer.learning_rate = 3e-4  # constant
  config.optimizer.rampup_images = 0  # 0 for no ramp
  config.optimizer.b1 = 0.9  # decay of the first moment
  config.optimizer.b2 = 0.999  # decay of the second moment
  config.optimizer.eps = 1e-8  # added to the root of the second
  config.optimizer.weight_decay = 0.0  # decoupled
  config.optimizer.clip_norm = 0.0  # 0 is off
  config.optimizer.sanitise_gradients = False  # EDM's rule

  config.ema = config_dict.ConfigDict()  # one entry per average, by name
  config.ema.constant = config_dict.ConfigDict()
  config.ema.constant.kind = "constant"  # or halflife
  config.ema.constant.decay = 0.9999  # per step

  config.sampler = config_dict.ConfigDict()
  config.sampler.solver = "ddpm"  # ddpm, ddim, dpmpp_2m or unipc
  config.sampler.steps = 250  # network evaluations
  config.sampler.guidance_scale = guidance  # 1 is off
  config.sampler.guidance_schedule = "power_cosine"  # or constant
  config.sampler.guidance_power = 4.0  # of the cosine's argument
  config.sampler.guidance_channels = 3  # the first so many; 0 for all
  config.sampler.guidance_interval = ()  # (low, high) timesteps; () everywhere
  config.sampler.guidance_tolerance = 0.0  # skip where |scale - 1| is below
  config.sampler.solver_options = ""  # as eta=1,spacing=trailing for ddim
  config.sampler.num_grid = 16  # images of a sample grid during training

  config.mesh = config_dict.ConfigDict()
  config.mesh.data = -1  # groups that hold a copy of the state; -1 is the rest
  config.mesh.fsdp = 16  # devices that share one copy; all where fewer
  config.mesh.num_devices = 0  # that must be there; 0 for any number

  config.num_microbatches = 1  # parts of a batch, one after the other
  config.num_threads = 4  # batches decoded at the same time
  config.log_every_steps = 100  # metrics; the only waits for the device
  config.trackers = ("tensorboard",)  # of metrics; or wandb, trackio
  config.sample_every_steps = 50_000  # grid of EMA samples; 0 for none
  config.save_every_steps = 10_000  # checkpoints
  config.keep_checkpoints = 3  # newest that stay
  config.keep_every_steps = 500_000  # these stay for ever; 0 for none
  config.keep_best_by = ""  # what the best checkpoint stays by, as loss or fid
  config.evaluate_every_steps = 0  # a score of samples, as FID; 0 for none
  config.evaluation = config_dict.ConfigDict()  # see docs/evaluation.md
  config.evaluation.num = 10_000  # samples that are scored
  config.evaluation.features = "inception"  # or digits, pixels
  config.evaluation.metrics = ("fid",)  # of that space
  config.evaluation.reference = ""  # a statistics file or images
  config.snapshot_every_steps = 0  # averages kept for export --ema=WIDTH
  config.watchdog_seconds = 1800  # a step this late ends the program; 0 is off

  if debug:
    config.batch_size = 8
    config.total_steps = 4
    config.data.resolution = config.model.input_size = 4
    config.data.num_classes = config.model.num_classes = 3
    config.model.hidden_dim = 16
    config.model.depth = 2
    config.model.num_heads = 2
    config.sampler.steps = 4
    config.sampler.num_grid = 4
    config.log_every_steps = 2
    config.sample_every_steps = 4
    config.save_every_steps = 2
  common.use_flow(config, objective, common.LATENT_TIME_SCALE)
  if ema == "power":
    common.add_power_averages(config)
  return config
