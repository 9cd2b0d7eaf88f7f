"""ADM: the discrete diffusion, its learned variance and loss, for latents.

Ho et al. 2020 (arXiv 2006.11239), Nichol and Dhariwal 2021 (arXiv 2102.09672)
and Dhariwal and Nichol 2021 (arXiv 2105.05233). T = 1000 steps t = 0..T-1 with
linear betas, alpha = 1 - beta, abar_t = alpha_0 ... alpha_t and abar_{-1} = 1:

  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                      (1)
  x_0 = x_t / sqrt(abar_t) - sqrt(1/abar_t - 1) eps                  (2)

The posterior q(x_{t-1} | x_t, x_0) is normal with

  mean     = c1 x_0 + c2 x_t                                         (3)
    c1 = beta_t sqrt(abar_{t-1}) / (1 - abar_t)
    c2 = (1 - abar_{t-1}) sqrt(alpha_t) / (1 - abar_t)
  variance = beta_t (1 - abar_{t-1}) / (1 - abar_t)                  (4)

whose logarithm, minus infinity at t = 0, takes its value of t = 1 there. The
network predicts eps and, in a second half of its channels, v, which places the
model's log-variance between (4) and beta:

  log sigma^2 = f ln beta_t + (1 - f) ln variance_t,  f = (v + 1)/2  (5)

The loss of one sample is the mean over its elements of the squared error of eps
plus that of the variational bound in bits, with factor 1:

  mse  = (eps - eps_hat)^2                                           (6)
  vb   = KL(q(x_{t-1} | x_t, x_0) | p(x_{t-1} | x_t)) / ln 2,  t > 0 (7)
       = -ln P(x_0 | x_1) / ln 2,                              t = 0 (8)
  loss = mse + vb                                                    (9)

with P the mass that p puts on a bin of width 2/255 around x_0, latents or not
(`bound`). No gradient of vb reaches eps_hat: mse alone trains the mean, vb the
variance. By (1)-(3) the two means differ by

  c1 (x_0 - x_0_hat) = c1 sqrt(1/abar_t - 1) (eps_hat - eps),       (10)

which needs no x_t, cancels no digits where the step is small, and at t = 0,
where c1 = 1 and c2 = 0, is also x_0 less the model's mean, all that (8) needs.

Respacing keeps some of the steps and rebuilds all tables from the betas that
join them,

  beta'_k = 1 - abar[t_k] / abar[t_{k-1}].                          (11)

The network is still told t_k, the step it was trained with. Tables are float64
on the host, and float32 (float64 for float64 arrays) where they are indexed.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion import bound, spacing
from diffit_jax.diffusion.arrays import at_least_float32, per_sample
from diffit_jax.errors import UserError

# See `kinds`.
FIELDS, SOLVERS, ON_LATENTS = ("num_steps",), "adm", True


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """Tables of n steps, [n] float64 each; k counts them, from clean to noisy.

  A diffusion as `kinds` has it, whose levels are steps t.

  Attributes:
    timesteps: what the network is told at step k, 0..999: ints, or floats if
      the respacing is one with fractions.
    betas: beta_k.
    alphas_cumprod: abar_k.
    alphas_cumprod_prev: abar_{k-1}, 1 at k = 0.
    signal, sigma: sqrt(abar_k) and sqrt(1 - abar_k), the factors in (1).
    x_to_x0, eps_to_x0: the factors of x_t and -eps in (2).
    c1, c2: of (3).
    posterior_variance: (4), 0 at k = 0.
    posterior_log_variance: its logarithm, entry 0 replaced by entry 1.
    log_betas: ln beta_k.
  """

  timesteps: np.ndarray
  betas: np.ndarray
  alphas_cumprod: np.ndarray
  alphas_cumprod_prev: np.ndarray
  signal: np.ndarray
  sigma: np.ndarray
  x_to_x0: np.ndarray
  eps_to_x0: np.ndarray
  c1: np.ndarray
  c2: np.ndarray
  posterior_variance: np.ndarray
  posterior_log_variance: np.ndarray
  log_betas: np.ndarray
  level = "t"  # its name among a training step's draws

  @property
  def num_steps(self) -> int:
    return len(self.betas)

  def sample_level(self, keys: jax.Array) -> jax.Array:
    """Training steps, uniform, one per sample: keys [b] -> t [b] int32."""
    draw = lambda key: jax.random.randint(key, (), 0, self.num_steps, jnp.int32)
    return jax.vmap(draw)(keys)

  def denoise(self, network: Callable, x: jax.Array, t: jax.Array) -> jax.Array:
    """What the solvers are given: the network's eps, and v if it has one."""
    return network(x, t)

  def train_losses(
    self, network: Callable, y: jax.Array, t: jax.Array, noise: jax.Array
  ) -> jax.Array:
    """[b] hybrid losses (9) of clean latents y."""
    output = network(self.q_sample(y, t, noise), t)
    return self.losses(output, y, t, noise)["loss"]

  def q_sample(
    self, x0: jax.Array, t: jax.Array, noise: jax.Array
  ) -> jax.Array:
    """x_t of (1).

    Args:
      x0: [b, h, w, c] clean latents.
      t: [b] ints, steps of this schedule: 0..999 where it is not respaced.
      noise: [b, h, w, c] unit normal, eps.

    Returns:
      [b, h, w, c], at least float32. A t beyond the schedule gives NaN.
    """
    x0, noise = at_least_float32(x0), at_least_float32(noise)
    return _at(self.signal, t, x0) * x0 + _at(self.sigma, t, x0) * noise

  def log_ratio(self, v: jax.Array, t: jax.Array) -> jax.Array:
    """ln of the model's variance (5) over (4): v [b, h, w, c], t [b].

    The two come within 1e-6, which float32 logarithms of up to 10 would lose.
    """
    v = at_least_float32(v)
    range_ = self.log_betas - self.posterior_log_variance
    return (v + 1) / 2 * _at(range_, t, v)

  def losses(
    self,
    model_output: jax.Array,
    x0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
  ) -> dict[str, jax.Array]:
    """(6)-(9), per sample; the batch loss is the mean of "loss".

    Args:
      model_output: [b, h, w, 2c] eps_hat and v for x_t = q_sample(x0, t,
        noise), or [b, h, w, c] eps_hat of a network without variance.
      x0: [b, h, w, c] clean latents.
      t: [b] ints, steps of this schedule: 0..999 where it is not respaced.
      noise: [b, h, w, c] eps.

    Returns:
      "mse", "vb" and "loss", [b] each, at least float32. Without a variance
      there is no "vb", and the loss is mse.
    """
    eps, v = split_output(model_output, x0.shape[-1])
    x0, noise, eps = map(at_least_float32, (x0, noise, eps))
    mse = _mean_per_sample((noise - eps) ** 2)
    if v is None:
      return {"mse": mse, "loss": mse}
    # In units of the posterior's std, so that no logarithm is large.
    std = np.exp(self.posterior_log_variance / 2)
    scale = self.c1 * self.eps_to_x0 / std  # (10)
    difference = _at(scale, t, x0) * (jax.lax.stop_gradient(eps) - noise)
    log_ratio = self.log_ratio(v, t)
    kl = bound.normal_kl(difference, 0.0, log_ratio)
    nll = -bound.discretized_log_likelihood(
      x0, difference, log_ratio, _at(std, t, x0)
    )
    is_process_0 = per_sample(jnp.asarray(t) == 0)
    vb = _mean_per_sample(jnp.where(is_process_0, nll, kl)) / math.log(2)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def make_schedule(
  num_steps: int = 1000, respacing: int | str | None = None
) -> Schedule:
  """The tables of the linear betas, whole or respaced (11).

  Args:
    num_steps: T. The betas run from 0.1/T to 20/T, ADM's rule, which at 1000
      is 1e-4 to 2e-2.
    respacing: None for all steps, or as `spacing` places them: N or "N" steps,
      "ddimN", "trailingN", "logsnrN", "karrasN" or "logsnr_exactN".

  Raises:
    UserError: num_steps or respacing cannot be had; says what can.
  """
  if type(num_steps) is not int or num_steps <= 20:
    raise UserError(
      f"{num_steps=} must be a whole number above 20, where linear betas "
      "stay below 1"
    )
  if respacing is None:
    return _tables(np.arange(num_steps), _linear_betas(num_steps))
  return respace(num_steps, *spacing.parse(respacing, num_steps))


def _linear_betas(num_steps: int) -> np.ndarray:
  return np.linspace(0.1 / num_steps, 20 / num_steps, num_steps)


def respace(num_steps: int, name: str, n: int) -> Schedule:
  """(11) for n of the steps, as the spacing of that name places them."""
  log_abar = np.cumsum(np.log1p(-_linear_betas(num_steps)))
  kept = spacing.SPACINGS[name](log_abar, n)
  abar = np.exp(np.interp(kept, np.arange(num_steps), log_abar))
  return _tables(kept, 1 - abar / np.append(1.0, abar[:-1]))


def _tables(timesteps: np.ndarray, betas: np.ndarray) -> Schedule:
  alphas = 1 - betas
  abar = np.cumprod(alphas)
  previous = np.append(1.0, abar[:-1])
  variance = betas * (1 - previous) / (1 - abar)
  # One step alone has no entry 1; its variance is multiplied by 0 anyway.
  floor = variance[1] if len(betas) > 1 else betas[0]
  return Schedule(
    timesteps=timesteps,
    betas=betas,
    alphas_cumprod=abar,
    alphas_cumprod_prev=previous,
    signal=np.sqrt(abar),
    sigma=np.sqrt(1 - abar),
    x_to_x0=1 / np.sqrt(abar),
    eps_to_x0=np.sqrt(1 / abar - 1),
    c1=betas * np.sqrt(previous) / (1 - abar),
    c2=(1 - previous) * np.sqrt(alphas) / (1 - abar),
    posterior_variance=variance,
    posterior_log_variance=np.log(np.append(floor, variance[1:])),
    log_betas=np.log(betas),
  )


def make(config: Mapping) -> Schedule:
  """The schedule of `config.diffusion`, which has num_steps."""
  return make_schedule(config.get("num_steps", 1000))


def split_output(
  model_output: jax.Array, channels: int
) -> tuple[jax.Array, jax.Array | None]:
  """[b, h, w, 2c] -> eps, v [b, h, w, c] each; [b, h, w, c] -> eps, None.

  Args:
    model_output: output of the network.
    channels: c, of the data.
  """
  found = model_output.shape[-1]
  if found == channels:
    return model_output, None
  if found != 2 * channels:
    raise UserError(
      f"the network gives {found} channels for data with {channels}: it must "
      f"be {channels} (eps) or {2 * channels} (eps and v)"
    )
  return model_output[..., :channels], model_output[..., channels:]


def interpolate_log_variance(v, log_beta, posterior_log_variance):
  """(5) from its three numbers."""
  f = (v + 1) / 2
  return f * log_beta + (1 - f) * posterior_log_variance


def _at(table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
  """Entries t [b] of a table as [b, 1, 1, 1], NaN beyond its end."""
  return per_sample(jnp.asarray(table, like.dtype).at[t].get(mode="fill"))


def _mean_per_sample(x: jax.Array) -> jax.Array:
  # By axis: the sum of thousands in one row, as of a small batch, loses digits.
  return x.mean(axis=3).mean(axis=2).mean(axis=1)
