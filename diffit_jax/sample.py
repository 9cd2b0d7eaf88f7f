"""Samples images from a run or from an exported file.

  python -m diffit_jax.sample --workdir=runs/ffhq64 --out=samples --num=64
  python -m diffit_jax.sample --checkpoint=ffhq64.safetensors --out=samples

Writes images/<i>.png, grid.png and an ADM-style samples_<n>x<h>x<w>x3.npz.
Sample i depends on (--seed, i) alone. An interrupted run goes on where it
stopped; another setting in the same folder is refused.
"""

from absl import flags

from diffit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A .safetensors file that diffit_jax.export wrote."
)
_OUT = flags.DEFINE_string("out", None, "Folder for the images.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Images per call of the network, over all devices."
)
_SAMPLING = cli.define_sampling_flags()


def main() -> int:
  cli.require_one_of(workdir=_WORKDIR.value, checkpoint=_CHECKPOINT.value)
  cli.require_one_of(out=_OUT.value)
  from diffit_jax.generation import job, weights
  from diffit_jax.parallel.mesh import make_mesh

  mesh = make_mesh()
  if _WORKDIR.value:
    loaded = weights.from_workdir(_WORKDIR.value, mesh, _SAMPLING.ema.value)
  else:
    loaded = weights.from_file(_CHECKPOINT.value, mesh, _SAMPLING.ema.value)
  _SAMPLING.apply(loaded.config.sampler)
  result = job.sample_to_folder(
    loaded,
    mesh,
    _OUT.value,
    num=_SAMPLING.num.value,
    seed=_SAMPLING.seed.value,
    labels=_SAMPLING.labels.value,
    batch_size=_BATCH_SIZE.value,
  )
  if result is None:
    return cli.REQUEUE
  print(f"grid: {result.grid}")
  print(f"images: {result.npz}")
  return 0


if __name__ == "__main__":
  cli.run(main)
