"""Exports a run's EMA weights as one safetensors file that describes itself.

python -m diffit_jax.export --workdir=runs/ffhq64 --out=ffhq64.safetensors
"""

from absl import flags

from diffit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
_OUT = flags.DEFINE_string("out", None, "The .safetensors file to write.")
_EMA = flags.DEFINE_string(
  "ema", None, "Name of the average; none for the raw parameters."
)


def main() -> int:
  cli.require_one_of(workdir=_WORKDIR.value)
  cli.require_one_of(out=_OUT.value)
  from diffit_jax.generation import weights
  from diffit_jax.interop import native
  from diffit_jax.parallel.mesh import make_mesh

  loaded = weights.from_workdir(_WORKDIR.value, make_mesh(), _EMA.value)
  native.save(
    _OUT.value,
    loaded.params,
    {
      "config": loaded.config.to_json_best_effort(),
      "step": str(loaded.step),
      "ema": loaded.ema,
    },
  )
  print(f"{_OUT.value}: step {loaded.step}, ema {loaded.ema}")
  return 0


if __name__ == "__main__":
  cli.run(main)
