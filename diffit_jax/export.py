"""Exports weights as one safetensors file, for sampling elsewhere.

  python -m diffit_jax.export --workdir=runs/ffhq64 --out=ffhq64.safetensors
  python -m diffit_jax.export --workdir=runs/imagenet256 --layout=official \
      --out=diffit_256.safetensors

--layout=native carries its own config. --layout=official has exactly the keys,
shapes and dtypes of the released weights, for the official PyTorch code; only
latent models have it. --checkpoint=FILE converts a file instead of a run.
--ema=0.08 makes the power-function average of that relative width from the
run's snapshots, at the newest of them (Karras et al. 2024).
"""

from absl import flags

from diffit_jax import cli, sampling_flags

_WEIGHTS = sampling_flags.define_weights_flags()
_LAYOUT = flags.DEFINE_enum(
  "layout", "native", ["native", "official"], "Layout of the file to write."
)
_OUT = cli.define_path("out", "The .safetensors file to write.")
_EMA = flags.DEFINE_string(
  "ema",
  None,
  "Name of the average; none for the raw parameters; a relative width such as"
  " 0.08, which is made from the run's snapshots. Default: the run's first.",
)


def main() -> None:
  cli.require_one_of(**_WEIGHTS.sources)
  cli.require_one_of(out=_OUT.value)
  cli.require_local(_OUT.value)
  cli.require_one_process()
  from diffit_jax.interop import files
  from diffit_jax.parallel.mesh import make_mesh

  mesh = make_mesh()
  loaded = _WEIGHTS.load(mesh, _EMA.value)
  files.write_weights(
    _OUT.value,
    loaded.params,
    loaded.config,
    step=loaded.step,
    ema=loaded.ema,
    about=loaded.about,
    layout=_LAYOUT.value,
  )
  print(f"{_OUT.value}: step {loaded.step}, ema {loaded.ema}")
  if loaded.about:
    print(loaded.about)


if __name__ == "__main__":
  cli.run(main)
