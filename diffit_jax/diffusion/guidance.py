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
after them stay conditional. Outside of an `interval` of noise levels s = 1
(Kynkaanniemi et al. 2024, arXiv 2404.07724; not in the DiffiT paper).

Where s = 1, u does not matter and need not be computed: `skippable` says where,
for a sampler that knows its noise levels beforehand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

SCHEDULES = ("constant", "power_cosine")
NUM_TIMESTEPS = 1000


def guidance_scale(
  t: jax.Array | None,
  *,
  scale: float,
  schedule: str = "constant",
  power: float = 4.0,
  interval: tuple[float, float] | None = None,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """s(t) of (2) or (3).

  Args:
    t: [*b] original timestep 0..999; may be None if the schedule is constant
      and there is no interval.
    scale: 1 is no guidance, 0 is the prediction without label.
    schedule: one of `SCHEDULES`.
    power: exponent of the power-cosine schedule.
    interval: (low, high), both included, in the unit of t, which is sigma if
      the levels are; s = 1 outside. None guides everywhere.
    dtype: of the result; None is that of t, at least float32.

  Returns:
    [*b], or a scalar if t is None.
  """
  _check(schedule, interval)
  if t is None and schedule == "constant" and interval is None:
    return jnp.full((), scale, dtype or jnp.float32)
  if t is None:
    raise UserError(f"guidance {schedule=}, {interval=} needs the timestep t")
  t = jnp.asarray(t)
  t = t.astype(dtype or jnp.promote_types(t.dtype, jnp.float32))
  return _scale(t, jnp, scale, schedule, power, interval)


def skippable(
  levels: np.ndarray,
  *,
  scale: float,
  schedule: str = "constant",
  power: float = 4.0,
  interval: tuple[float, float] | None = None,
  tolerance: float = 0.0,
) -> np.ndarray:
  """Where guidance may be left out: |s(level) - 1| <= tolerance.

  On the host, for `sampling.sample(..., skip=...)`. Exact by default: s is 1 in
  float32, so that leaving out u changes rounding at most.

  Args:
    levels: [n] noise levels, of `guidance_scale`'s t.
    scale: a number, not traced.
    schedule, power, interval: see `guidance_scale`.
    tolerance: how far from 1 still counts as 1.

  Returns:
    [n] bool.
  """
  _check(schedule, interval)
  if tolerance < 0:
    raise UserError(f"guidance {tolerance=} must not be negative")
  levels = np.asarray(levels, np.float64)
  s = _scale(levels, np, scale, schedule, power, interval)
  return np.abs(s.astype(np.float32).astype(np.float64) - 1) <= tolerance


def _scale(t, xp, scale, schedule, power, interval):
  """(2), (3) and the interval, by numpy or jax.numpy."""
  s = xp.full_like(t, scale)
  if schedule == "power_cosine":
    clean = 1 - t / NUM_TIMESTEPS
    # (1 - cos a) / 2 = sin(a/2)^2, which keeps its digits where it is tiny.
    s = 1 + (scale - 1) * xp.sin(xp.pi / 2 * clean**power) ** 2
  if interval is None:
    return s
  low, high = interval
  return xp.where((low <= t) & (t <= high), s, 1)


def _check(schedule, interval):
  if schedule not in SCHEDULES:
    raise UserError(
      f"guidance schedule={schedule!r} is unknown; allowed: "
      + ", ".join(SCHEDULES)
    )
  if interval is not None and (
    len(interval) != 2 or not interval[0] <= interval[1]
  ):
    raise UserError(
      f"guidance {interval=} must be (low, high) with low <= high"
    )


def apply_cfg(
  cond: jax.Array,
  uncond: jax.Array,
  t: jax.Array | None,
  *,
  scale: float,
  schedule: str = "constant",
  power: float = 4.0,
  channels: int | str = "all",
  interval: tuple[float, float] | None = None,
) -> jax.Array:
  """Guided prediction (1).

  Args:
    cond: [b, h, w, c] prediction with the label.
    uncond: [b, h, w, c] prediction with the null label.
    t: [b] original timestep 0..999; may be None if the schedule is constant
      and there is no interval.
    scale, schedule, power, interval: see `guidance_scale`.
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
  dtype = jnp.promote_types(cond.dtype, jnp.float32)
  s = guidance_scale(
    t,
    scale=scale,
    schedule=schedule,
    power=power,
    interval=interval,
    dtype=dtype,
  )
  if _is_off(scale):
    return cond
  n = cond.shape[-1] if channels == "all" else channels
  c, u = cond[..., :n].astype(dtype), uncond[..., :n].astype(dtype)
  guided = u + s[..., None, None, None] * (c - u)
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
    **cfg: scale, schedule, power, channels, interval of `apply_cfg`; the level
      is its t.
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
