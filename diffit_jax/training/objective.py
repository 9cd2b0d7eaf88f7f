"""From a batch of images or latents to one loss per sample.

A step's random draws are made apart from its losses, which are then a function
of arrays alone and can be compared with another program's.

Every draw is keyed on (seed, step, global sample index): the key of the step,
folded with the sample's index, is split by purpose. So a sample meets the same
augmentation, noise level, noise and label drop on any number of devices.
"""

from collections.abc import Mapping
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.diffusion import augment, kinds


@dataclasses.dataclass(frozen=True)
class Images:
  """Batches with "image" uint8 [b, h, w, c], augmented.

  Attributes:
    augment_prob: probability of each augmentation; 0 for none.
  """

  augment_prob: float

  def shape(self, batch: dict) -> tuple[int, ...]:
    """[h, w, c] of a sample."""
    return batch["image"].shape[1:]

  def draws(self, keys: jax.Array, batch: dict) -> dict:
    """`augment`, as `augment.draw` gives it, where images are augmented."""
    if not self.augment_prob:
      return {}
    return {"augment": augment.draw_keys(keys, self.augment_prob)}

  def clean(self, batch: dict, draws: dict) -> tuple[jax.Array, dict]:
    """(images in [-1, 1], what else the network is told)."""
    y = batch["image"].astype(jnp.float32) / 127.5 - 1
    if "augment" not in draws:
      return y, {}
    drawn = draws["augment"]
    y = augment.augment(y, drawn)
    return y, {"augment_labels": augment.labels(drawn)}


@dataclasses.dataclass(frozen=True)
class Latents:
  """Batches with "moments" [b, h, w, 2c] of a VAE: mean, then log-variance.

  Attributes:
    scaling_factor: what a draw from the posterior is multiplied with.
  """

  scaling_factor: float

  def shape(self, batch: dict) -> tuple[int, ...]:
    """[h, w, c] of a sample."""
    *shape, channels = batch["moments"].shape[1:]
    return (*shape, channels // 2)

  def draws(self, keys: jax.Array, batch: dict) -> dict:
    """`posterior_noise`, unit normal [b, h, w, c]."""
    return {"posterior_noise": normal(keys, self.shape(batch))}

  def clean(self, batch: dict, draws: dict) -> tuple[jax.Array, dict]:
    """(latents, what else the network is told)."""
    moments = batch["moments"].astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
    return self.scaling_factor * (mean + std * draws["posterior_noise"]), {}


@dataclasses.dataclass(frozen=True)
class Objective:
  """The training objective of a diffusion on images or latents.

  Attributes:
    model: raw network (x, level, labels, and what `data` and dropout add).
    diffusion: noise levels and loss.
    data: what a batch holds.
    label_drop_prob: how often the model is told no label.
  """

  model: nn.Module
  diffusion: kinds.Diffusion
  data: Images | Latents
  label_drop_prob: float

  def draws(self, step_key: jax.Array, batch: dict[str, jax.Array]) -> dict:
    """All random draws of a step.

    Args:
      step_key: typed key of the step.
      batch: what `data` reads, with "label" int32 [b] and "index" uint32 [b].

    Returns:
      The noise level ("sigma" or "t") [b]; "noise" [b, h, w, c]; "labels" [b],
      some dropped, or None without classes; "augment" or "posterior_noise" of
      `data`; "dropout_key" where the model has dropout.
    """
    k_data, k_level, k_noise, k_label = sample_keys(step_key, batch["index"], 4)
    null_label, labels = self.model.num_classes, None
    if null_label:
      prob = self.label_drop_prob
      labels = drop_labels(k_label, batch["label"], null_label, prob)
    draws = self.data.draws(k_data, batch) | {"labels": labels}
    draws[self.diffusion.level] = self.diffusion.sample_level(k_level)
    draws["noise"] = normal(k_noise, self.data.shape(batch))
    if getattr(self.model, "dropout", 0):
      draws["dropout_key"] = step_key  # folded with the sample's index inside
    return draws

  def losses(
    self, params, batch: dict[str, jax.Array], draws: dict
  ) -> jax.Array:
    """[b] float32 losses of a batch, given the draws."""
    y, told = self.data.clean(batch, draws)
    if "dropout_key" in draws:
      told["sample_index"] = batch["index"]
      told["rngs"] = {"dropout": draws["dropout_key"]}
    network = lambda x, level: self.model.apply(
      {"params": params}, x, level, draws["labels"], **told
    )
    level = draws[self.diffusion.level]
    return self.diffusion.train_losses(network, y, level, draws["noise"])


def make(
  model: nn.Module, config: Mapping, scaling_factor: float | None = None
) -> Objective:
  """The objective of a config.

  Args:
    model: the network.
    config: the whole config, or its section `diffusion` alone.
    scaling_factor: scale of latents; None is that of a whole config's section
      `autoencoder`, or images.
  """
  section = config.get("diffusion", config)
  is_whole = section is not config
  if scaling_factor is None and is_whole and kinds.is_latent(config):
    scaling_factor = config["autoencoder"]["scaling_factor"]
  data = Latents(scaling_factor)
  if scaling_factor is None:
    data = Images(section.get("augment_prob", 0.0))
  drop_prob = section.get("label_drop_prob", 0.0)
  return Objective(model, kinds.make(section), data, drop_prob)


def sample_keys(step_key: jax.Array, index: jax.Array, num: int) -> jax.Array:
  """[num, b] keys: `num` purposes for each of the b sample indices."""
  fold = lambda i: jax.random.split(jax.random.fold_in(step_key, i), num)
  return jnp.swapaxes(jax.vmap(fold)(index), 0, 1)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Unit normal draws, one per key: keys [b] -> [b, *shape] float32."""
  draw = lambda key: jax.random.normal(key, shape, jnp.float32)
  return jax.vmap(draw)(keys)


def drop_labels(
  keys: jax.Array, labels: jax.Array, null_label: int, prob: float
) -> jax.Array:
  """[b] labels, each replaced by the null label with probability `prob`."""
  prob = jnp.float32(prob)  # its type is that of the draw
  drop = jax.vmap(lambda k: jax.random.bernoulli(k, prob))(keys)
  return jnp.where(drop, null_label, labels)
