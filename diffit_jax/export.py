"""Exports weights as one safetensors file, for sampling elsewhere.

  python -m diffit_jax.export --workdir=runs/ffhq64 --out=ffhq64.safetensors
  python -m diffit_jax.export --workdir=runs/imagenet256 --layout=official \
      --out=diffit_256.safetensors

--layout=native carries its own config. --layout=official has exactly the keys,
shapes and dtypes of the released weights, for the official PyTorch code; only
latent models have it. --checkpoint=FILE converts a file instead of a run.
--ema=0.08 makes the power-function average of that relative width from the
run's snapshots, at the newest of them (Karras et al. 2024).

--push=hf://OWNER/NAME/FILE.safetensors uploads the file and a model card to the
Hugging Face Hub; docs/hub.md says what it asks and what it writes.
"""

import tempfile

from absl import flags

from diffit_jax import cli, sampling_flags
from diffit_jax.errors import UserError

_WEIGHTS = sampling_flags.define_weights_flags()
_LAYOUT = flags.DEFINE_enum(
  "layout", "native", ["native", "official"], "Layout of the file to write."
)
_OUT = cli.define_path(
  "out", "The .safetensors file to write; not needed with --push."
)
_EMA = flags.DEFINE_string(
  "ema",
  None,
  "Name of the average; none for the raw parameters; a relative width such as"
  " 0.08, which is made from the run's snapshots. Default: the run's first.",
)
_PUSH = flags.DEFINE_string(
  "push",
  None,
  "Where on the Hugging Face Hub the file goes, with a model card:"
  " hf://owner/name/file.safetensors.",
)
_CARD = cli.define_path(
  "card",
  "Score card for the model card of --push. Default: that of this step, where"
  " the run scored itself.",
)
_PRIVATE = flags.DEFINE_bool(
  "private", False, "A repository that --push creates is private."
)
_YES = flags.DEFINE_bool(
  "yes", False, "--push creates a public repository without a question."
)


def main() -> None:
  cli.require_one_of(**_WEIGHTS.sources)
  _check_flags()
  cli.require_one_process()
  from diffit_jax import publishing
  from diffit_jax.interop import files, push
  from diffit_jax.parallel.mesh import make_mesh

  target = _PUSH.value and push.open_target(
    _PUSH.value, is_private=_PRIVATE.value, is_sure=_YES.value
  )
  loaded = _WEIGHTS.load(make_mesh(), _EMA.value)
  score = target and publishing.find_score(
    _CARD.value, _WEIGHTS.workdir.value, loaded
  )
  with tempfile.TemporaryDirectory() as folder:
    path = _OUT.value or f"{folder}/pushed.safetensors"
    files.write_weights(
      path,
      loaded.params,
      loaded.config,
      step=loaded.step,
      ema=loaded.ema,
      about=loaded.about,
      layout=_LAYOUT.value,
    )
    print(f"{_OUT.value or _PUSH.value}: step {loaded.step}, ema {loaded.ema}")
    if loaded.about:
      print(loaded.about)
    if target:
      pushed = publishing.publish(target, path, loaded, _LAYOUT.value, score)
      print(f"pushed: {pushed}")


def _check_flags() -> None:
  if _OUT.value:
    cli.require_local(_OUT.value)
  if _PUSH.value:
    return
  for flag in (_CARD, _PRIVATE, _YES):
    if flag.value:
      raise UserError(f"--{flag.name} goes with --push")
  cli.require_one_of(out=_OUT.value)


if __name__ == "__main__":
  cli.run(main)
