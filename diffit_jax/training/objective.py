"""From a batch of images or latents to one loss per sample.

Every random draw is keyed on (seed, step, global sample index): the key of the
step, folded with the sample's index, is split by purpose. So a sample meets the
same augmentation, noise level, noise and label drop on any number of devices.
"""

from collections.abc import Callable, Mapping

from flax import linen as nn
import jax
import jax.numpy as jnp

from diffit_jax.diffusion import adm, augment, precond

Loss = Callable[[dict, dict[str, jax.Array], jax.Array], jax.Array]


def sample_keys(step_key: jax.Array, index: jax.Array, num: int) -> jax.Array:
  """[num, b] keys: `num` purposes for each of the b sample indices."""
  fold = lambda i: jax.random.split(jax.random.fold_in(step_key, i), num)
  return jnp.swapaxes(jax.vmap(fold)(index), 0, 1)


def normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Unit normal draws, one per key: keys [b] -> [b, *shape] float32."""
  draw = lambda key: jax.random.normal(key, shape, jnp.float32)
  return jax.vmap(draw)(keys)


def edm_loss(model: nn.Module, config: Mapping) -> Loss:
  """EDM's training objective on augmented images, or VP's or VE's.

  Args:
    model: raw network F(x, c_noise, labels, augment_labels, sample_index).
    config: what `precond.make` reads, augment_prob (0 for no augmentation) and
      label_drop_prob.

  Returns:
    loss(params, batch, step_key) -> [b] float32, with batch "image" uint8
    [b, h, w, c], "label" int32 [b] and "index" uint32 [b].
  """
  num_classes, process = model.num_classes, precond.make(config)

  def loss(params, batch, step_key):
    index = batch["index"]
    k_augment, k_sigma, k_noise, k_label = sample_keys(step_key, index, 4)
    y = batch["image"].astype(jnp.float32) / 127.5 - 1
    augment_labels = None
    if config["augment_prob"]:
      drawn = augment.draw_keys(k_augment, config["augment_prob"])
      y, augment_labels = augment.augment(y, drawn), augment.labels(drawn)
    labels = None
    if num_classes:
      labels = drop_labels(
        k_label, batch["label"], num_classes, config["label_drop_prob"]
      )
    sigma = process.sample_sigma(k_sigma)
    noise = normal(k_noise, y.shape[1:])

    def network(x, c_noise):
      return model.apply(
        {"params": params},
        x,
        c_noise,
        labels,
        augment_labels,
        sample_index=index,
        rngs={"dropout": step_key},
      )

    x = y + sigma[:, None, None, None] * noise
    return process.loss(process.denoise(network, x, sigma), y, sigma)

  return loss


def adm_loss(model: nn.Module, config: Mapping, scaling_factor: float) -> Loss:
  """ADM's hybrid loss on latents that are drawn from the VAE's posterior.

  Args:
    model: raw network (x_t, t, labels) -> eps, or eps and v.
    config: num_steps and label_drop_prob.
    scaling_factor: of the latents; x_0 = scaling_factor (mean + std noise).

  Returns:
    loss(params, batch, step_key) -> [b] float32, with batch "moments"
    [b, h, w, 2c] (mean, then log-variance), "label" and "index".
  """
  schedule = adm.make_schedule(config["num_steps"])

  def loss(params, batch, step_key):
    index = batch["index"]
    k_posterior, k_t, k_noise, k_label = sample_keys(step_key, index, 4)
    moments = batch["moments"].astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
    shape = mean.shape[1:]
    x_0 = scaling_factor * (mean + std * normal(k_posterior, shape))
    t = adm.sample_timesteps(k_t, config["num_steps"])
    noise = normal(k_noise, shape)
    labels = None
    if model.num_classes:
      labels = drop_labels(
        k_label, batch["label"], model.num_classes, config["label_drop_prob"]
      )
    x_t = schedule.q_sample(x_0, t, noise)
    output = model.apply({"params": params}, x_t, t, labels)
    return schedule.losses(output, x_0, t, noise)["loss"]

  return loss


def drop_labels(
  keys: jax.Array, labels: jax.Array, null_label: int, prob: float
) -> jax.Array:
  """[b] labels, each replaced by the null label with probability `prob`."""
  prob = jnp.float32(prob)  # its type is that of the draw
  drop = jax.vmap(lambda k: jax.random.bernoulli(k, prob))(keys)
  return jnp.where(drop, null_label, labels)
