"""Samples images from a run, an exported file, or released weights.

  python -m diffit_jax.sample --workdir=runs/ffhq64 --out=samples --num=64
  python -m diffit_jax.sample --checkpoint=ffhq64.safetensors --out=samples
  python -m diffit_jax.sample --checkpoint=diffit_256.safetensors \
      --config=configs/imagenet256.py --vae=sd-vae-ft-ema --out=samples

Writes images/<i>.png, grid.png and an ADM-style samples_<n>x<h>x<w>x3.npz. A
latent model without --vae writes latents instead: latents/<i>.npy and an npz.
Sample i depends on (--seed, i) alone. An interrupted run goes on where it
stopped; another setting in the same folder is refused.
"""

from absl import flags

from diffit_jax import cli, sampling_flags

_WEIGHTS = sampling_flags.define_weights_flags()
_OUT = cli.define_path("out", "Folder for the images.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Images per call of the network, over all devices.", 1
)
_SAMPLING = sampling_flags.define_sampling_flags()


def main() -> None:
  cli.require_one_of(**_WEIGHTS.sources)
  cli.require_one_of(out=_OUT.value)
  cli.require_local(_OUT.value)
  cli.require_one_process()
  from diffit_jax.generation import job
  from diffit_jax.parallel.mesh import make_mesh

  mesh = make_mesh()
  loaded, codec = _SAMPLING.open(_WEIGHTS, mesh)
  result = job.sample_to_folder(
    loaded,
    mesh,
    _OUT.value,
    num=_SAMPLING.num.value,
    seed=_SAMPLING.seed.value,
    labels=_SAMPLING.labels.value,
    batch_size=_BATCH_SIZE.value,
    codec=codec,
  )
  if result.grid:
    print(f"grid: {result.grid}")
    print(f"images: {result.npz}")
  else:
    print(f"latents, since --vae was not given: {result.npz}")


if __name__ == "__main__":
  cli.run(main)
