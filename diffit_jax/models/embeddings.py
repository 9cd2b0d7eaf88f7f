"""What the image-space network knows about noise level, label and augmentation.

The mapping network of EDM's DDPM++ (Karras et al. 2022, arXiv 2206.00364; Song
et al. 2021): a sinusoidal embedding of c_noise, plus linear maps of label and
augmentation labels, through two linear layers with SiLU. Its output is the time
token x_t of every TMSA. Float32 throughout, whatever the network's dtype.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError


def positional_embedding(x: jax.Array, dim: int) -> jax.Array:
  """[sin(x f_k), cos(x f_k)] with f_k = 10000^(-k / (dim/2 - 1)), float32.

  Args:
    x: [b] noise labels.
    dim: even width of the embedding.

  Returns:
    [b, dim]: dim/2 sines, then dim/2 cosines.
  """
  half = dim // 2
  frequencies = 10000.0 ** (-np.arange(half) / max(half - 1, 1))
  angles = x.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class NoiseEmbedding(nn.Module):
  """c_noise, label and augmentation labels -> time token.

  Attributes:
    num_channels: width of the sinusoidal embedding.
    time_dim: width of the time token.
    num_classes: labels 0..num_classes-1; label num_classes is "no label". 0 is
      an unconditional network without these parameters.
    augment_dim: number of augmentation labels, 0 for a network without them.
  """

  num_channels: int
  time_dim: int
  num_classes: int = 0
  augment_dim: int = 0

  @nn.compact
  def __call__(
      self,
      c_noise: jax.Array,
      labels: jax.Array | None = None,
      augment_labels: jax.Array | None = None,
  ) -> jax.Array:
    """[b] c_noise, [b] int labels, [b, augment_dim] -> [b, time_dim].

    Labels left out mean "no label"; augmentation labels left out mean zeros,
    an image that was not augmented.
    """
    dense = lambda name, features, use_bias=True: nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=nn.initializers.xavier_uniform(),
        name=name,
    )
    x = positional_embedding(c_noise, self.num_channels)
    if self.num_classes:
      if labels is None:
        labels = jnp.full(c_noise.shape, self.num_classes)
      # The null label num_classes has no column: its row is all zeros.
      one_hot = jax.nn.one_hot(labels, self.num_classes)
      x += dense("map_label", self.num_channels)(
          one_hot * self.num_classes**0.5
      )
    elif labels is not None:
      raise UserError("labels were given to an unconditional model")
    if self.augment_dim:
      if augment_labels is None:
        augment_labels = jnp.zeros((*c_noise.shape, self.augment_dim))
      x += dense("map_augment", self.num_channels, use_bias=False)(
          augment_labels.astype(jnp.float32)
      )
    elif augment_labels is not None:
      raise UserError("augment_labels were given to a model with augment_dim=0")
    x = nn.silu(dense("map_layer0", self.time_dim)(x))
    return nn.silu(dense("map_layer1", self.time_dim)(x))
