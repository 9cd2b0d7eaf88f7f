"""Which autoencoder a config means, if any."""

from collections.abc import Mapping

from diffit_jax.autoencoder import Autoencoder, load_autoencoder
from diffit_jax.autoencoder.patch_code import PatchCode
from diffit_jax.errors import UserError

KINDS = ("sd_vae", "patch")


def make_codec(
  config: Mapping, vae: str | None = None
) -> Autoencoder | PatchCode | None:
  """The autoencoder of `config.autoencoder`, if the config has that section.

  Args:
    config: the whole config; autoencoder (kind, down_factor, scaling_factor)
      and model.channels are read.
    vae: diffusers folder of the SD VAE.

  Returns:
    None for an image-space model, and for the SD VAE without its folder.

  Raises:
    UserError: the folder's VAE is not the one that the config describes.
  """
  channels = config["model"]["channels"]
  config = config.get("autoencoder")
  if config is None:
    if vae:
      raise UserError(f"--vae={vae} has no use: this model works on images")
    return None
  kind = config["kind"]
  if kind not in KINDS:
    raise UserError(f"autoencoder.kind={kind!r}: use one of {KINDS}")
  if kind == "patch":
    if vae:
      raise UserError(f"--vae={vae} has no use with autoencoder.kind='patch'")
    return PatchCode(config["down_factor"], config["scaling_factor"])
  if not vae:
    return None
  codec = load_autoencoder(vae)
  for field in ("down_factor", "scaling_factor"):
    if getattr(codec, field) != config[field]:
      raise UserError(
        f"--vae={vae} has {field} {getattr(codec, field)}, and the config"
        f" autoencoder.{field}={config[field]}"
      )
  if (codec.module.in_channels, codec.module.latent_channels) != (3, channels):
    raise UserError(
      f"--vae={vae} makes {codec.module.latent_channels} channels from"
      f" {codec.module.in_channels}, and the model's latents have {channels}"
      " from 3"
    )
  return codec
