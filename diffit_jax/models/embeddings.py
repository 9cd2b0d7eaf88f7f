"""What the networks know about noise level, label, augmentation and place.

Noise level and label end as the time token x_t of every TMSA, in float32
whatever the network's dtype.

Image space: the mapping network of EDM's DDPM++ (Karras et al. 2022, arXiv
2206.00364; Song et al. 2021), a sinusoidal embedding of c_noise, plus linear
maps of label and augmentation labels, through two linear layers with SiLU.
Latent space: ADM's timestep embedding through its own two layers, plus a table
of labels (Dhariwal and Nichol 2021, arXiv 2105.05233; the released DiffiT):

  x_t = W_2 SiLU(W_1 [cos(t f), sin(t f)]) + table[label]
  f_k = 10000^(-k / (dim/2)), k = 0 .. dim/2 - 1

with the cosines first and no SiLU after W_2, unlike image space. Its tokens
also get fixed positions; in image space they have none.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

EMBEDDINGS = ("positional", "fourier")


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


def fourier_embedding(x: jax.Array, frequencies: np.ndarray) -> jax.Array:
  """[sin(2 pi f_k x), cos(2 pi f_k x)], float32 (Song et al. 2021).

  Args:
    x: [b] noise labels.
    frequencies: [dim/2] fixed frequencies f_k.

  Returns:
    [b, dim]: dim/2 sines, then dim/2 cosines.
  """
  angles = x.astype(jnp.float32)[:, None] * (2 * np.pi * frequencies).astype(
    np.float32
  )
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fixed_frequencies(num: int) -> np.ndarray:
  """[num] draws of 16 N(0, 1), the same in every network, float64.

  CHOICE: a constant and no parameter, from numpy's frozen generator.
  """
  return 16 * np.random.RandomState(0).standard_normal(num)


class NoiseEmbedding(nn.Module):
  """c_noise, label and augmentation labels -> time token.

  Attributes:
    num_channels: width of the sinusoidal embedding.
    time_dim: width of the time token.
    num_classes: labels 0..num_classes-1; label num_classes is "no label". 0 is
      an unconditional network without these parameters.
    augment_dim: number of augmentation labels, 0 for a network without them.
    kind: "positional", or "fourier" with as many random frequencies (Table 8).
  """

  num_channels: int
  time_dim: int
  num_classes: int = 0
  augment_dim: int = 0
  kind: str = "positional"

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
    if self.kind == "fourier":
      frequencies = fixed_frequencies(self.num_channels // 2)
      x = fourier_embedding(c_noise, frequencies)
    else:
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


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
  """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (dim/2)), float32.

  A float32 product t f_k near 1000 would be off by 3e-5. Each f_k is cut into
  12 leading bits, whose product with a whole t below 4096 is exact, and a rest
  whose angle is small; the addition theorems join them to within 1e-7.

  Args:
    t: [b] timesteps 0..999, whole or fractional.
    dim: even width of the embedding.

  Returns:
    [b, dim]: dim/2 cosines, then dim/2 sines.
  """
  half = dim // 2
  frequencies = 10000.0 ** (-np.arange(half) / half)
  bits = frequencies.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)
  coarse = bits.view(np.float32)
  fine = (frequencies - coarse).astype(np.float32)
  t = t.astype(jnp.float32)[:, None]
  cos_a, sin_a = jnp.cos(t * coarse), jnp.sin(t * coarse)
  cos_b, sin_b = jnp.cos(t * fine), jnp.sin(t * fine)
  return jnp.concatenate(
    [cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b], axis=-1
  )


class TimestepEmbedding(nn.Module):
  """W_2 SiLU(W_1 [cos(t f), sin(t f)]), biases included.

  Attributes:
    features: output width.
    frequency_dim: width of the sinusoidal embedding.
  """

  features: int
  frequency_dim: int = 256

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    """[b] timesteps -> [b, features] float32."""
    dense = lambda name: nn.Dense(
      self.features, kernel_init=nn.initializers.normal(0.02), name=name
    )
    x = timestep_embedding(t, self.frequency_dim)
    return dense("fc2")(nn.silu(dense("fc1")(x)))


class LabelEmbedding(nn.Module):
  """A table with one row per class and, last, one for "no label".

  Attributes:
    num_classes: labels 0..num_classes-1.
    features: output width.
    null_label: whether row num_classes exists.
  """

  num_classes: int
  features: int
  null_label: bool = True

  @nn.compact
  def __call__(self, labels: jax.Array) -> jax.Array:
    """[b] int -> [b, features]; a label that has no row gives NaN, loudly."""
    table = self.param(
      "embedding",
      nn.initializers.normal(0.02),
      (self.num_classes + self.null_label, self.features),
      jnp.float32,
    )
    return (
      jnp.asarray(table)
      .at[labels]
      .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )


def sincos_positions(dim: int, grid: int) -> np.ndarray:
  """Fixed positions (11) of `latent`, in float64 rounded once, as released.

  Args:
    dim: width, a multiple of 4.
    grid: tokens along one side.

  Returns:
    [grid^2, dim] float32, tokens numbered along rows.
  """
  omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4))
  angles = np.arange(grid)[:, None] * omega
  axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  columns = np.broadcast_to(axis, (grid, grid, dim // 2))
  table = np.concatenate([columns, columns.swapaxes(0, 1)], axis=-1)
  return table.reshape(grid**2, dim).astype(np.float32)
