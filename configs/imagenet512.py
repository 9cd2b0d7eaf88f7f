"""ImageNet-512, a variation of imagenet256: class-conditional (Table 1).

  paper         FID 2.67, IS 252.12, precision 0.83, recall 0.55
                (50,000 samples, 250 DDPM steps, constant guidance of 1.49)
  ours          not yet run
  network       562.4 M parameters + 1.2 M fixed positions, 28 blocks of 1152

  python -m diffit_jax.prepare imagenet_latents --source=IMAGENET/train \
      --vae=sd-vae-ft-ema --resolution=512 --name=imagenet512_latents
  python -m diffit_jax.main --config=configs/imagenet512.py

Variants, after a colon and separated by commas:
  depth=28|paper_text   blocks: the released weights, or H.2's 30
  data=latents|images   from prepared latents, or encoded on the fly (--vae)
  objective=adm|flow|sit|jit  the paper's own, or flow matching
  precision=bf16|paper  bfloat16 blocks, or float32
  ema=one|power         the average below, or two more for export --ema=WIDTH
  debug                 the same path with a small network and a few steps
"""

from typing import Literal

from ml_collections import config_dict

from configs import common, imagenet256


def get_config(arg: str | None = None) -> config_dict.ConfigDict:
  return common.resolve(base, arg)


def base(
  *,
  depth: Literal[28, "paper_text"] = 28,
  data: Literal["latents", "images"] = "latents",
  objective: common.LatentObjective = "adm",
  precision: Literal["bf16", "paper"] = "bf16",
  ema: common.Averages = "one",
  debug: bool = False,
) -> config_dict.ConfigDict:
  config = imagenet256.base(
    depth=depth, data=data, precision=precision, debug=debug
  )
  config.name = "imagenet512"
  config.data.name = config.data.name.replace("256", "512")
  config.optimizer.learning_rate = 1e-4
  config.sampler.guidance_scale = 1.49
  config.sampler.guidance_schedule = "constant"
  if not debug:
    config.batch_size = 512
    config.total_steps = 3_500_000  # the paper does not say; as many images
    config.data.resolution = 64  # side of a latent: pixels / 8
    config.model.input_size = 64
  common.use_flow(config, objective, common.LATENT_TIME_SCALE)
  if ema == "power":
    common.add_power_averages(config)
  return config
