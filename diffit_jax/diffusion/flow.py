"""Flow matching: the straight path from data to noise, and how it is trained.

Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2023 (arXiv 2209.03003); the
notation is near that of SiT (Ma et al. 2024, arXiv 2401.08740). Between a clean
image or latent y and unit normal noise n, at a share of noise t in [0, 1],

  x = (1 - t) y + t n,   v = dx/dt = n - y.                          (1)

A network F is told (x, t) and predicts y ("x"), n ("eps") or v ("v"). The clean
data that its prediction stands for is, by (1),

  prediction    x         eps                      v
  D             F         (x - t F) / (1 - t)      x - t F           (2)

and all three errors are multiples of that of D: of n by -(1 - t)/t, of v by
-1/t. So the loss, taken in any of the three, is the error of what is predicted
times a weight that has only to do with t:

  loss   = weight mean (F - target)^2                                (3)
  weight = (g_loss / g_prediction)^2,  g_x = t, g_eps = 1 - t, g_v = 1

with the mean over the elements of a sample. Where a prediction is divided, so
is its target: `clamp` is the least that either is divided by, g_prediction
becomes max(g_prediction, clamp). JiT (Li and He 2025, arXiv 2511.13720)
predicts x, takes the loss in v and clamps at 0.05.

Training draws t by u -> t -> t', with u uniform in (0, 1), n unit normal:

  t  = u  ("uniform"),  t = 1 / (1 + e^-(t_mean + t_std n))  ("logit_normal")
  t' = shift t / (1 + (shift - 1) t)                                 (4)

Esser et al. 2024 (arXiv 2403.03206): more noise for more pixels. With an EDM
denoiser D (diffusion/edm.py) it shares all but the parametrisation: the signal
to noise ratio of x is that of sigma = t / (1 - t), and

  D_flow(x; t) = D_edm(x / (1 - t); sigma).                          (5)

What the network receives as time is `time_scale` t. CHOICE: 1000 for latents,
as the timesteps of ADM; for images see configs/common.py.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.arrays import at_least_float32, per_sample
from diffit_jax.errors import UserError

# See `kinds`.
FIELDS = (
  "prediction",
  "loss",
  "time",
  "t_mean",
  "t_std",
  "shift",
  "clamp",
  "time_scale",
  "augment_prob",
)
SOLVERS, ON_LATENTS = "flow", True

TIMES = ("uniform", "logit_normal")

# (2): F, x, t [b, 1, 1, 1] -> D.
CLEAN: dict[str, Callable] = {
  "x": lambda F, x, t: F,
  "eps": lambda F, x, t: (x - t * F) / (1 - t),
  "v": lambda F, x, t: x - t * F,
}
_TARGET = {
  "x": lambda y, noise: y,
  "eps": lambda y, noise: noise,
  "v": lambda y, noise: noise - y,
}
# g of (3): the error of each is proportional to it.
_ERROR = {"x": lambda t: t, "eps": lambda t: 1 - t, "v": jnp.ones_like}


@dataclasses.dataclass(frozen=True)
class Flow:
  """A diffusion as `kinds` has it, whose levels are shares of noise t.

  Attributes:
    prediction: what the network predicts: "x", "eps" or "v".
    loss: what the error is taken in, likewise.
    time: one of `TIMES`, how training draws t.
    t_mean, t_std: of the logit of t, for "logit_normal".
    shift: of (4); 1 leaves t as it is.
    clamp: least divisor of prediction and target in the loss; 0 is none.
    time_scale: the network is told time_scale t.
  """

  prediction: str = "v"
  loss: str = "v"
  time: str = "uniform"
  t_mean: float = 0.0
  t_std: float = 1.0
  shift: float = 1.0
  clamp: float = 0.0
  time_scale: float = 1000.0
  level = "t"  # its name among a training step's draws

  def __post_init__(self):
    for field in ("prediction", "loss"):
      if getattr(self, field) not in CLEAN:
        raise UserError(
          f"diffusion.{field}={getattr(self, field)!r}: use one of"
          f" {(*CLEAN,)}; a flow predicts clean data, noise or velocity, and"
          " takes its loss in one of them"
        )
    if self.time not in TIMES:
      raise UserError(f"diffusion.time={self.time!r}: use one of {TIMES}")
    if self.time == "uniform" and (self.t_mean, self.t_std) != (0, 1):
      raise UserError(
        f"diffusion.t_mean={self.t_mean} and t_std={self.t_std} say nothing of"
        " time='uniform': leave them at 0 and 1, or set time='logit_normal'"
      )
    if not 0 <= self.clamp < 1:
      raise UserError(
        f"diffusion.clamp={self.clamp} must be at least 0 and below 1, where it"
        " cuts the whole path"
      )

  def sample_level(self, keys: jax.Array) -> jax.Array:
    """t' of (4) for training: keys [b] -> [b] float32, each of its key."""
    if self.time == "uniform":
      draw = lambda key: jax.random.uniform(key, (), jnp.float32)
      # The middles of the 2^23 steps that float32 draws have: never 0 or 1.
      t = jax.vmap(draw)(keys) + 2.0**-24
    else:
      draw = lambda key: jax.random.normal(key, (), jnp.float32)
      t = jax.nn.sigmoid(self.t_mean + self.t_std * jax.vmap(draw)(keys))
    # Of extreme settings rounding alone would make 0 or 1.
    return jnp.clip(shifted(t, self.shift), 2.0**-24, 1 - 2.0**-24)

  def loss_weight(self, t: jax.Array) -> jax.Array:
    """(3): t [*b] in (0, 1) -> [*b], at least float32."""
    t = at_least_float32(t)
    if self.loss == self.prediction:
      return jnp.ones_like(t)
    divisor = jnp.maximum(_ERROR[self.prediction](t), self.clamp)
    return (_ERROR[self.loss](t) / divisor) ** 2

  def denoise(
    self, network: Callable, x: jax.Array, t: jax.Array
  ) -> jax.Array:
    """D(x; t), equation (2).

    Args:
      network: (x [b, h, w, c], time_scale t [b]) -> F [b, h, w, c], any dtype.
      x: [b, h, w, c] on the path.
      t: [b]; below 1 where the network predicts noise.

    Returns:
      [b, h, w, c], at least float32, the expected clean data.
    """
    x = at_least_float32(x)
    F = self._predict(network, x, t).astype(x.dtype)
    return CLEAN[self.prediction](F, x, per_sample(t))

  def train_losses(
    self, network: Callable, y: jax.Array, t: jax.Array, noise: jax.Array
  ) -> jax.Array:
    """[b] losses (3) of clean data y and their noise, at least float32."""
    y, noise = at_least_float32(y), at_least_float32(noise)
    x = (1 - per_sample(t)) * y + per_sample(t) * noise  # (1)
    F = at_least_float32(self._predict(network, x, t))
    error = F - _TARGET[self.prediction](y, noise)
    return self.loss_weight(t) * jnp.mean(error**2, axis=(1, 2, 3))

  def _predict(self, network: Callable, x: jax.Array, t: jax.Array):
    """F, refused where it is not of the shape of x."""
    F = network(x, self.time_scale * t)
    if F.shape != x.shape:
      raise UserError(
        f"the network gives {F.shape[-1]} channels for data with"
        f" {x.shape[-1]}: a flow has no variance, set model.learn_sigma=False"
      )
    return F


def shifted(t, shift: float):
  """(4): shares of noise [*n], numpy's or JAX's, moved to 1 by shift > 1."""
  return shift * t / (1 + (shift - 1) * t)


def make(config: Mapping) -> Flow:
  """The flow of `config.diffusion`; for a missing field, `Flow`'s default."""
  fields = [field.name for field in dataclasses.fields(Flow)]
  return Flow(**{name: config[name] for name in fields if name in config})


def check_levels(config: Mapping, levels: np.ndarray) -> None:
  """Refuses pure noise for a network that predicts noise: (2) divides by 0."""
  if make(config).prediction == "eps" and np.float32(np.max(levels)) >= 1:
    raise UserError(
      "diffusion.prediction='eps' says nothing of the data at t = 1, where this"
      " solver starts: use solver_options=t_max=0.999, or less"
    )
