"""Classifier-free guidance: the one place for its rule.

Ho and Salimans 2022 (arXiv 2207.12598), with the weight schedule of MDT that
DiffiT's release uses. From a prediction with the label, c, and one without, u,

  guided = u + s(t) (c - u)                                          (1)
  s(t)   = scale                                       "constant"    (2)
  s(t)   = 1 + (scale - 1) (1 - cos(pi (1 - t/1000)^power)) / 2
                                                       "power_cosine" (3)

(3) leaves high noise unguided (s -> 1) and reaches `scale` at t = 0. The t in
it is the original step 0..999 that the network receives, and the divisor is
1000, however few of the steps a sampler takes. The release guides only the
first three of a latent's channels; `channels` is for that, and the channels
after them stay conditional.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError

SCHEDULES = ("constant", "power_cosine")
NUM_TIMESTEPS = 1000


def guidance_scale(
    t: jax.Array | None,
    *,
    scale: float,
    schedule: str = "constant",
    power: float = 4.0,
) -> jax.Array:
  """s(t) of (2) or (3).

  Args:
    t: [*b] original timestep 0..999; may be None if the schedule is constant.
    scale: 1 is no guidance, 0 is the prediction without label.
    schedule: one of `SCHEDULES`.
    power: exponent of the power-cosine schedule.

  Returns:
    [*b] float32, or a scalar if t is None.
  """
  if schedule not in SCHEDULES:
    raise UserError(
        f"guidance schedule={schedule!r} is unknown; allowed: "
        + ", ".join(SCHEDULES)
    )
  if schedule == "constant":
    shape = () if t is None else jnp.shape(t)
    return jnp.full(shape, scale, jnp.float32)
  if t is None:
    raise UserError("guidance schedule='power_cosine' needs the timestep t")
  clean = 1 - jnp.asarray(t, jnp.float32) / NUM_TIMESTEPS
  # (1 - cos a) / 2 = sin(a/2)^2, which keeps its digits where it is tiny.
  return 1 + (scale - 1) * jnp.sin(jnp.pi / 2 * clean**power) ** 2


def apply_cfg(
    cond: jax.Array,
    uncond: jax.Array,
    t: jax.Array | None,
    *,
    scale: float,
    schedule: str = "constant",
    power: float = 4.0,
    channels: int | str = "all",
) -> jax.Array:
  """Guided prediction (1).

  Args:
    cond: [b, h, w, c] prediction with the label.
    uncond: [b, h, w, c] prediction with the null label.
    t: [b] original timestep 0..999; may be None if the schedule is constant.
    scale, schedule, power: see `guidance_scale`.
    channels: "all", or how many of the first channels are guided; the others
      are those of `cond`.

  Returns:
    [b, h, w, c] in the dtype of `cond`. A scale of exactly 1 is `cond` itself,
    bit for bit.
  """
  if channels != "all" and (
      not isinstance(channels, int) or not 1 <= channels <= cond.shape[-1]
  ):
    raise UserError(
        f"guidance {channels=} must be 'all' or from 1 to the "
        f"{cond.shape[-1]} channels of the prediction"
    )
  s = guidance_scale(t, scale=scale, schedule=schedule, power=power)
  if _is_off(scale):
    return cond
  n = cond.shape[-1] if channels == "all" else channels
  dtype = jnp.promote_types(cond.dtype, jnp.float32)
  c, u = cond[..., :n].astype(dtype), uncond[..., :n].astype(dtype)
  guided = u + s.astype(dtype)[..., None, None, None] * (c - u)
  return jnp.concatenate([guided.astype(cond.dtype), cond[..., n:]], axis=-1)


def guided(
    network: Callable[..., jax.Array],
    labels: jax.Array | None,
    null_label: int,
    **cfg,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """A denoiser (x, level) -> prediction with guidance already applied.

  With and without label run as one batch of 2b rows, interleaved (a sample's
  two rows are neighbours), so that a batch sharded over devices stays where it
  is. A scale of exactly 1 runs b rows.

  Args:
    network: (x [b, h, w, c], level [b], labels [b]) -> [b, h, w, c'].
    labels: [b] ints; None for an unconditional network, which allows no other
      scale than 1.
    null_label: the label that means "none".
    **cfg: scale, schedule, power, channels of `apply_cfg`; the level is its t.
  """
  if _is_off(cfg["scale"]):
    return lambda x, level: network(x, level, labels)
  if labels is None:
    raise UserError(
        f"guidance scale={cfg['scale']} needs labels; without them only 1"
    )

  def denoiser(x, level):
    both = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1)
    out = network(
        jnp.repeat(x, 2, axis=0), jnp.repeat(level, 2), both.reshape(-1)
    )
    cond, uncond = jnp.moveaxis(out.reshape(-1, 2, *out.shape[1:]), 1, 0)
    return apply_cfg(cond, uncond, level, **cfg)

  return denoiser


def _is_off(scale) -> bool:
  """Whether the scale is known to be 1 (a traced one is not known)."""
  return isinstance(scale, (int, float)) and scale == 1
