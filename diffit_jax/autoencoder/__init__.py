"""The frozen VAE between images and the latents of the latent model.

`load_autoencoder` reads a diffusers folder such as stabilityai/sd-vae-ft-ema.
Its `encode` and `decode` take any number of images and work through them in
chunks of one shape, so each is compiled once per image size. Inside another
jitted function use `encode_fn(params, x)` and `decode_fn(params, z)`, with
`params` among that function's arguments so that it does not become a constant
of the program.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.autoencoder.model import AutoencoderKL
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.interop import diffusers

__all__ = ["Autoencoder", "AutoencoderKL", "load_autoencoder"]

# CHOICE: images per chunk where none is given. A CPU gains nothing from more
# than one, and a single image is then never padded.
_CHUNK_SIZE = {"cpu": 1}
_ACCELERATOR_CHUNK_SIZE = 8


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(module: AutoencoderKL, method: str, params: Mapping, x: jax.Array):
  """Runs one direction; modules of equal sizes share the compilation."""
  return module.apply({"params": params}, x, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
  """A VAE with its weights.

  Attributes:
    module: the network.
    params: its parameters, nested dict of float32 arrays.
    scaling_factor: a diffusion model's latent is this times a latent here.
    hash: SHA-256 of the weights file, in hex.
    source: the folder it was read from.
    chunk_size: images per call of the compiled program.
  """

  module: AutoencoderKL
  params: Mapping
  scaling_factor: float
  hash: str
  source: str
  chunk_size: int

  @property
  def down_factor(self) -> int:
    """Side of an image over the side of its latent."""
    return self.module.down_factor

  def encode(self, images) -> tuple[jax.Array, jax.Array]:
    """The Gaussian of the unscaled latent of each image.

    Args:
      images: [b, h, w, c] floats in [-1, 1], any b; `down_factor` divides h
        and w.

    Returns:
      mean and log-variance, each [b, h/f, w/f, latent_channels] float32.
    """
    self._check_images(images)
    return self._in_chunks(self.encode_fn, "encode", images)

  def decode(self, latents) -> jax.Array:
    """Images, in about [-1, 1] and not clamped, of unscaled latents.

    Args:
      latents: [b, h, w, latent_channels], any b; those of a diffusion model
        divided by `scaling_factor`.

    Returns:
      [b, f h, f w, c] float32.
    """
    self._check_latents(latents)
    return self._in_chunks(self.decode_fn, "decode", latents)

  def encode_fn(
    self, params: Mapping, images: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """`encode` as a pure function of one whole batch, for use under jit."""
    self._check_images(images)
    return _apply(self.module, "encode", params, images)

  def decode_fn(self, params: Mapping, latents: jax.Array) -> jax.Array:
    """`decode` as a pure function of one whole batch, for use under jit."""
    self._check_latents(latents)
    return _apply(self.module, "decode", params, latents)

  def _in_chunks(self, function: Callable, method: str, x):
    """Applies `function`, padding the last chunk to the size of the others."""
    if isinstance(x, jax.core.Tracer):
      return function(self.params, x)
    x = np.asarray(x, np.float32)
    num, size = len(x), self.chunk_size
    results = []
    for start in range(0, max(num, 1), size):
      chunk = x[start : start + size]
      padding = [(0, size - len(chunk))] + [(0, 0)] * 3
      results.append(
        _apply(self.module, method, self.params, np.pad(chunk, padding))
      )
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num], *results)

  def _check_images(self, images) -> None:
    channels, factor = self.module.in_channels, self.down_factor
    shape, dtype = np.shape(images), jnp.result_type(images)
    if len(shape) != 4 or shape[-1] != channels:
      raise UserError(
        f"images of shape {shape} do not fit the VAE {self.source}: it"
        f" encodes [b, h, w, {channels}]"
      )
    if shape[1] % factor or shape[2] % factor or 0 in shape[1:3]:
      raise UserError(
        f"images of {shape[1]}x{shape[2]} pixels do not fit the VAE"
        f" {self.source}: both sides must be multiples of {factor}"
      )
    if not jnp.issubdtype(dtype, jnp.floating):
      raise UserError(
        f"images of type {dtype}: the VAE encodes floats in [-1, 1], for"
        " uint8 that is x / 127.5 - 1"
      )

  def _check_latents(self, latents) -> None:
    channels, shape = self.module.latent_channels, np.shape(latents)
    if len(shape) != 4 or shape[-1] != channels or 0 in shape[1:3]:
      raise UserError(
        f"latents of shape {shape} do not fit the VAE {self.source}: it"
        f" decodes [b, h, w, {channels}]"
      )


def load_autoencoder(
  directory: str | os.PathLike, chunk_size: int | None = None
) -> Autoencoder:
  """Reads a VAE from a diffusers folder.

  Args:
    directory: holds `config.json` and `diffusion_pytorch_model.safetensors`,
      or its fp16 or bf16 variant, with diffusers' new or old names for the
      attention.
    chunk_size: images that `encode` and `decode` hold at a time; None is 1 on
      a CPU and 8 elsewhere.

  Raises:
    UserError: a file is missing, a pickle, sharded, or cut short; the config
      asks for a network other than the SD VAE's; the weights do not fit the
      config.
  """
  if chunk_size is None:
    chunk_size = _CHUNK_SIZE.get(jax.default_backend(), _ACCELERATOR_CHUNK_SIZE)
  if chunk_size < 1:
    raise UserError(f"{chunk_size=} must be at least 1")
  config, weights = diffusers.find_files(directory)
  sizes, scaling_factor = diffusers.read_autoencoder_config(config)
  module = AutoencoderKL(**sizes)
  params = diffusers.read_autoencoder_weights(weights, abstract_params(module))
  with weights.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  return Autoencoder(
    module,
    jax.tree.map(jnp.asarray, params),
    scaling_factor,
    digest,
    str(directory),
    chunk_size,
  )


def abstract_params(module: AutoencoderKL) -> dict:
  """Shapes of the parameters, without computing anything."""
  side = module.down_factor
  image = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
  key = jax.random.key(0, impl=PRNG)
  return jax.eval_shape(module.init, key, image)["params"]
