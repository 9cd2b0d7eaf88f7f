"""A page in the browser that samples, and looks inside a network and its run.

  python -m diffit_jax.explore --workdir=runs/ffhq64
  python -m diffit_jax.explore --checkpoint=ffhq64.safetensors --port=8000

Needs `pip install 'diffit_jax[web]'`. The page is served to this machine alone
unless --host says otherwise; docs/explore.md says how it is kept so.
"""

import importlib.util

from absl import flags

from diffit_jax import cli, config_files, sampling_flags
from diffit_jax.errors import UserError

_WEIGHTS = sampling_flags.define_weights_flags()
_VAE = cli.define_path(
  "vae", "Diffusers folder of the SD VAE that decodes a latent model's samples."
)
_GUIDE = cli.define_path(
  "guide",
  "Workdir or .safetensors file, also hf://..., of a worse network, for"
  " autoguidance.",
)
_BESIDE = cli.define_path(
  "beside",
  "Workdir or .safetensors file of a network with the same blocks, whose"
  " attention is shown beside, such as one of model.time_in='plain'.",
)
_HOST = flags.DEFINE_string(
  "host",
  "127.0.0.1",
  "Address to serve on. Whoever reaches another one can use the page.",
)
_PORT = flags.DEFINE_integer(
  "port", 7860, "Port to serve on; 0 is any that is free.", 0, 65535
)


def main() -> None:
  cli.require_one_of(**_WEIGHTS.sources)
  if _WEIGHTS.step.value is not None:
    raise UserError("--step is chosen on the page: leave it out")
  if importlib.util.find_spec("gradio") is None:
    raise UserError("this page needs Gradio: pip install 'diffit_jax[web]'")
  cli.require_one_process()
  from diffit_jax.web import server

  listener = server.listen(_HOST.value, _PORT.value)
  from diffit_jax.web.studio import Studio

  studio = Studio(
    _WEIGHTS.workdir.value or _WEIGHTS.checkpoint.value,
    is_file=not _WEIGHTS.workdir.value,
    vae=_VAE.value,
    config=_config(),
    guide=_GUIDE.value,
    beside=_BESIDE.value,
  )
  server.serve(studio, _HOST.value, listener)


def _config():
  """The config of a --checkpoint that has none of its own, or None."""
  if _WEIGHTS.config.value is None:
    return None
  if _WEIGHTS.workdir.value:
    raise UserError("--config goes with --checkpoint: a workdir has its own")
  return config_files.required(_WEIGHTS.config)


if __name__ == "__main__":
  cli.run(main)
