"""Trains DiffiT; run the same command again to resume.

  python -m diffit_jax.main --config=configs/ffhq64.py --workdir=runs/ffhq64

Variants follow the config file after a colon (configs/ffhq64.py:debug) and any
field can be set (--config.batch_size=64). Exit code 75 means that SIGTERM came
and the current step was saved: start the command again.
"""

from absl import flags
from ml_collections import config_flags

from diffit_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with variants after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<name of the config>."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Prepared data sets; default $TFDS_DATA_DIR."
)
_VAE = flags.DEFINE_string(
  "vae",
  None,
  "Diffusers folder of the SD VAE, for latent models: decodes sample grids, and"
  " encodes images where data.content=images.",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Print config, parameters, MACs and memory per device, and exit. Needs no"
  " data.",
)


def main() -> int:
  config = cli.required_config(_CONFIG)
  if _DRY_RUN.value:
    from diffit_jax.training import report

    print(report.dry_run(config))
    return 0
  from diffit_jax.generation.generator import SamplerOptions, make_grid_sampler
  from diffit_jax.training.loop import train

  SamplerOptions.from_config(config)  # a mistake in it would show late
  finished = train(
    config,
    _WORKDIR.value or f"runs/{config.name}",
    _DATA_DIR.value,
    make_grid_sampler,
    vae=_VAE.value,
  )
  return 0 if finished else cli.REQUEUE


if __name__ == "__main__":
  cli.run(main)
