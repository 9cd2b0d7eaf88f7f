"""Guidance, classifier-free and by another network: the one place for its rule.

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

Where s = 1, u does not matter and need not be computed: `Guidance.skippable`
says where, for a sampler that knows its noise levels beforehand.

Autoguidance (Karras et al. 2024, arXiv 2406.02507) leads away from g, what a
worse network predicts with the same label, by a weight w; with both,

  guided = c + (s(t) - 1) (c - u) + (w - 1) (c - g).                 (4)

w = 1 needs no g, and w = 0 is g where s = 1. The same `channels` are guided.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError

SCHEDULES = ("constant", "power_cosine")
NUM_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class Guidance:
  """A rule of guidance.

  Attributes:
    scale: 1 is no guidance, 0 is the prediction without label.
    schedule: one of `SCHEDULES`.
    power: exponent of the power-cosine schedule.
    channels: "all", or how many of the first channels are guided; the others
      are those of the prediction with the label.
    interval: (low, high), both included, in the unit of the levels; s = 1
      outside. None guides everywhere.
    guide_scale: w of (4); 1 is no guide.
    tolerance: how far from 1 a scale still counts as 1 in `skippable`. At 0 it
      is 1 in float32, so that leaving out u changes rounding at most.
  """

  scale: float | jax.Array = 1.0
  schedule: str = "constant"
  power: float = 4.0
  channels: int | str = "all"
  interval: tuple[float, float] | None = None
  tolerance: float = 0.0
  guide_scale: float = 1.0

  def __post_init__(self):
    if self.schedule not in SCHEDULES:
      raise UserError(
        f"guidance schedule={self.schedule!r} is unknown; allowed: "
        + ", ".join(SCHEDULES)
      )
    interval, tolerance = self.interval, self.tolerance
    if interval is not None and (
      len(interval) != 2 or not interval[0] <= interval[1]
    ):
      raise UserError(
        f"guidance {interval=} must be (low, high) with low <= high"
      )
    if tolerance < 0:
      raise UserError(f"guidance {tolerance=} must not be negative")

  @property
  def is_off(self) -> bool:
    """Whether the scale is known to be 1 (a traced one is not known)."""
    return isinstance(self.scale, (int, float)) and self.scale == 1

  @property
  def has_guide(self) -> bool:
    """Whether (4) needs g."""
    return self.guide_scale != 1

  def scale_at(
    self, t: jax.Array | None, dtype: jnp.dtype | None = None
  ) -> jax.Array:
    """s(t) of (2) or (3).

    Args:
      t: [*b] original timestep 0..999, or sigma of a model that has noise
        levels; may be None if the schedule is constant and there is no
        interval.
      dtype: type of the result; None is that of t, at least float32.

    Returns:
      [*b], or a scalar if t is None.
    """
    schedule, interval = self.schedule, self.interval
    if t is None and schedule == "constant" and interval is None:
      return jnp.full((), self.scale, dtype or jnp.float32)
    if t is None:
      raise UserError(f"guidance {schedule=}, {interval=} needs the timestep t")
    t = jnp.asarray(t)
    t = t.astype(dtype or jnp.promote_types(t.dtype, jnp.float32))
    return self._scale_at(t, jnp)

  def skippable(self, levels: np.ndarray) -> np.ndarray:
    """Where guidance may be left out: |s(level) - 1| <= tolerance.

    On the host, for `sampling.sample(..., skip=...)`; the scale is a number.

    Args:
      levels: [n] noise levels, as t of `scale_at`.

    Returns:
      [n] bool.
    """
    s = self._scale_at(np.asarray(levels, np.float64), np)
    off = np.abs(s.astype(np.float32).astype(np.float64) - 1)
    return off <= self.tolerance

  def _scale_at(self, t, xp):
    """(2), (3) and the interval, by numpy or jax.numpy."""
    s = xp.full_like(t, self.scale)
    if self.schedule == "power_cosine":
      clean = 1 - t / NUM_TIMESTEPS
      # (1 - cos a) / 2 = sin(a/2)^2, which keeps its digits where it is tiny.
      s = 1 + (self.scale - 1) * xp.sin(xp.pi / 2 * clean**self.power) ** 2
    if self.interval is None:
      return s
    low, high = self.interval
    return xp.where((low <= t) & (t <= high), s, 1)

  def apply(
    self,
    cond: jax.Array,
    uncond: jax.Array | None,
    t: jax.Array | None,
    guide: jax.Array | None = None,
  ) -> jax.Array:
    """Guided prediction (1), or (4).

    Args:
      cond: [b, h, w, c] prediction with the label.
      uncond: [b, h, w, c] prediction with the null label; None where the scale
        is 1.
      t: [b], see `scale_at`.
      guide: [b, h, w, >= c guided] the guide's prediction; None is (1).

    Returns:
      [b, h, w, c] in the dtype of `cond`. A scale of exactly 1 is `cond`
      itself, bit for bit.
    """
    channels, num_channels = self.channels, cond.shape[-1]
    if channels != "all" and (
      not isinstance(channels, int) or not 1 <= channels <= num_channels
    ):
      raise UserError(
        f"guidance {channels=} must be 'all' or from 1 to the "
        f"{num_channels} channels of the prediction"
      )
    dtype = jnp.promote_types(cond.dtype, jnp.float32)
    s = self.scale_at(t, dtype)
    if self.is_off and guide is None:
      return cond
    n = num_channels if channels == "all" else channels
    c = guided = cond[..., :n].astype(dtype)
    if not self.is_off:
      u = uncond[..., :n].astype(dtype)
      guided = u + s[..., None, None, None] * (c - u)
    if guide is not None:  # (4), which at w = 0 and s = 1 is g bit for bit
      g = guide[..., :n].astype(dtype)
      guided = (guided - c) + (g + self.guide_scale * (c - g))
    return jnp.concatenate([guided.astype(cond.dtype), cond[..., n:]], axis=-1)

  def denoiser(
    self,
    network: Callable[..., jax.Array],
    labels: jax.Array | None,
    null_label: int,
    guide: Callable[..., jax.Array] | None = None,
  ) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A denoiser (x, level) -> prediction with guidance already applied.

    With and without label run as one batch of 2b rows, interleaved (a sample's
    two rows are neighbours), so that a batch sharded over devices stays where
    it is. A scale of exactly 1 runs b rows. The guide always runs b.

    Args:
      network: (x [b, h, w, c], level [b], labels [b]) -> [b, h, w, c'].
      labels: [b] ints; None for an unconditional network, which allows no
        other scale than 1.
      null_label: the label that means "none".
      guide: as `network`, with other weights; None where there is no guide.
    """
    if self.has_guide and guide is None:
      raise UserError(f"guide_scale={self.guide_scale} needs a guide")
    lead = lambda x, level: guide(x, level, labels) if self.has_guide else None
    if self.is_off:
      cond = lambda x, level: network(x, level, labels)
      if not self.has_guide:
        return cond
      return lambda x, level: self.apply(
        cond(x, level), None, level, lead(x, level)
      )
    if labels is None:
      raise UserError(
        f"guidance scale={self.scale} needs labels; without them only 1"
      )

    def denoiser(x, level):
      both = jnp.stack([labels, jnp.full_like(labels, null_label)], axis=1)
      out = network(
        jnp.repeat(x, 2, axis=0), jnp.repeat(level, 2), both.reshape(-1)
      )
      cond, uncond = jnp.moveaxis(out.reshape(-1, 2, *out.shape[1:]), 1, 0)
      return self.apply(cond, uncond, level, lead(x, level))

    return denoiser


def apply_cfg(
  cond: jax.Array, uncond: jax.Array, t: jax.Array | None, **rule
) -> jax.Array:
  """`Guidance.apply` of a rule given by its fields."""
  return Guidance(**rule).apply(cond, uncond, t)
