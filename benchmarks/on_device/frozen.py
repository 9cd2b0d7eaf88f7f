"""Stages `vae` and `inception`: networks that are never trained here.

Made-up weights at the real sizes, float32 at full precision, as the commands
run them. Of the VAE also what default precision (TF32 on NVIDIA) would give.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.inception import made_up_state
from benchmarks.on_device import device, rows
from diffit_jax import autoencoder
from diffit_jax.autoencoder import model as vae_model
from diffit_jax.evaluation import load_inception

card = device.card

TINY_VAE = dict(
  block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4
)
# (side of the image, images, precision), in the order of their worth.
DECODED = (
  (256, 8, "highest"),
  (256, 8, "default"),
  (512, 4, "highest"),
  (512, 4, "default"),
)


def vae(record: rows.Record) -> None:
  for side, batch, precision in DECODED[:2] if record.is_tiny else DECODED:
    side, batch = (16, 2) if record.is_tiny else (side, batch)
    run = functools.partial(decode, side, batch, precision, record.is_tiny)
    about = {"image": f"{side}x{side}", "batch": batch, "precision": precision}
    record.attempt("decode", run, **about)


def decode(side: int, batch: int, precision: str, is_tiny: bool) -> dict:
  net = autoencoder.AutoencoderKL(**(TINY_VAE if is_tiny else {}))
  shapes = autoencoder.abstract_params(net)
  params = jax.jit(lambda: device.made_up(shapes))()
  side //= net.down_factor
  latents = jax.random.normal(
    jax.random.key(0), (batch, side, side, net.latent_channels)
  )
  run = jax.jit(lambda p, z: net.apply({"params": p}, z, method="decode"))
  of_name = jax.lax.Precision[precision.upper()]
  with mock.patch.object(vae_model, "PRECISION", of_name):
    return times(run, params, latents)


def inception_features(record: rows.Record) -> None:
  batch, side = (1, 32) if record.is_tiny else (128, 256)
  extractor = load_inception(made_up_state())

  def measure():
    shape = (batch, side, side, 3)
    images = jax.random.randint(jax.random.key(0), shape, 0, 256)
    params = jax.device_put(extractor.params)
    return times(jax.jit(extractor.apply), params, images.astype(jnp.uint8))

  about = {"image": f"{side}x{side}", "batch": batch, "precision": "highest"}
  record.attempt("features", measure, **about)


def times(run, params, x) -> dict:
  program, about = device.compiled(run, params, x)
  s = device.seconds(functools.partial(program, params, x), rounds=2)
  return {"ms": 1e3 * s, "images/s": len(x) / s, **about, **device.peak_gib()}
