"""Trains DiffiT; run the same command again to resume.

  python -m diffit_jax.main --config=configs/ffhq64.py --workdir=runs/ffhq64

Variants follow the config file after a colon (configs/ffhq64.py:debug) and any
field can be set (--config.batch_size=64). Exit code 75 means that SIGTERM came
and the current step was saved: start the command again.

On several hosts start the same command on each of them, with a workdir that
all of them see. TPU slices and Slurm steps are recognised; elsewhere add
--coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import functools

from absl import flags

from diffit_jax import cli, config_files

_CONFIG = config_files.define_flag("Config file, with variants after a colon.")
_WORKDIR = cli.define_path(
  "workdir", "Folder of the run; default runs/<name of the config>."
)
_DATA_DIR = cli.define_path(
  "data_dir", "Prepared data sets; default $TFDS_DATA_DIR."
)
_VAE = cli.define_path(
  "vae",
  "Diffusers folder of the SD VAE, for latent models: decodes sample grids, and"
  " encodes images where data.content=images.",
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run",
  False,
  "Print config, parameters, MACs and memory per device, and exit. Needs no"
  " data.",
)
_LIST = flags.DEFINE_bool(
  "list",
  False,
  "Print every experiment of the paper with its config, size and cost, and"
  " exit.",
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  None,
  "FIRST:END, as 10:13: traces these steps into <workdir>/plugins/profile, for"
  " `tensorboard --logdir=<workdir>` or `xprof <workdir>`.",
)
_INCEPTION = cli.define_inception_flag()
_RUNTIME = cli.define_runtime_flags()


def main() -> int:
  if _LIST.value:
    from diffit_jax.planning import listing

    experiments = config_files.ours("experiments")
    print(listing.table(experiments.EXPERIMENTS, experiments.SWEEPS))
    return 0
  config = config_files.required(_CONFIG)
  from diffit_jax.generation.generator import make_grid_sampler
  from diffit_jax.generation.options import SamplerOptions

  SamplerOptions.from_config(config)  # a mistake in it would show late
  if _DRY_RUN.value:
    from diffit_jax.training import summary

    print(summary.dry_run(config))
    return 0
  workdir = _WORKDIR.value or f"runs/{config.name}"
  from diffit_jax.parallel import runtime
  from diffit_jax.run.workdir import path_of
  from diffit_jax.training import timing
  from diffit_jax.training.loop import train

  make_evaluator = None
  if config.get("evaluate_every_steps"):
    from diffit_jax.evaluation import in_loop

    cli.require_local(workdir, "with evaluate_every_steps, --workdir")
    make_evaluator = functools.partial(
      in_loop.RunScorer,
      directory=workdir,
      inception=_INCEPTION.value,
      data_dir=_DATA_DIR.value,
    )
  profile_steps = timing.parse_steps(_PROFILE_STEPS.value)
  with _RUNTIME.distributed():
    runtime.use_compilation_cache(f"{path_of(workdir)}/compilation_cache")
    train(
      config,
      workdir,
      _DATA_DIR.value,
      make_grid_sampler,
      vae=_VAE.value,
      profile_steps=profile_steps,
      make_evaluator=make_evaluator,
    )
  return 0


if __name__ == "__main__":
  cli.run(main)
