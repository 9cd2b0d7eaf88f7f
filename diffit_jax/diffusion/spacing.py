"""Respacing: which of a diffusion's steps a sampler takes.

A spacing places n steps, told ln abar of all of them (see `adm`):

  uniform      evenly from 0 to T-1, rounded (ADM's rule; n = 1, which it leaves
               open, keeps T-1, where a sampler starts)
  ddim         every i-th from 0, i the smallest stride that gives n
  trailing     evenly from T-1 to T/n - 1, so that a sampler's last step, to
               clean data, is as long as the others
  logsnr       from T-1 to 0, evenly in ln(alpha/sigma), each the nearest step
               that is still free
  karras       the same in (sigma/alpha)^(1/7), as EDM
  logsnr_exact logsnr without rounding, with ln abar interpolated; the network
               is told fractions of steps
"""

from collections.abc import Callable
import re

import numpy as np

from diffit_jax.errors import UserError


def _uniform(log_abar: np.ndarray, n: int) -> np.ndarray:
  last = len(log_abar) - 1
  if n == 1:
    return np.array([last])
  # A running sum, rounded half to even: the released indices to the last one.
  return np.array(
    [round(x) for x in np.cumsum([0.0] + [last / (n - 1)] * (n - 1)).tolist()]
  )


def _ddim(log_abar: np.ndarray, n: int) -> np.ndarray:
  total = len(log_abar)
  counts = {i: len(range(0, total, i)) for i in range(total - 1, 0, -1)}
  strides = {count: i for i, count in counts.items()}  # the smallest stays
  if n not in strides:
    below = max((c for c in strides if c < n), default=min(strides))
    above = min(c for c in strides if c > n)
    raise UserError(
      f"no whole stride keeps {n} of {total} steps; the nearest are "
      f"'ddim{below}' and 'ddim{above}'"
    )
  return np.arange(0, total, strides[n])


def _trailing(log_abar: np.ndarray, n: int) -> np.ndarray:
  total = len(log_abar)
  return np.rint(np.arange(1, n + 1) * (total / n)).astype(np.int64) - 1


def _evenly_in(to_grid: Callable, from_grid: Callable) -> Callable:
  """Fractional steps, evenly in to_grid(sigma / alpha)."""

  def place(log_abar: np.ndarray, n: int) -> np.ndarray:
    last = len(log_abar) - 1
    ratio = np.sqrt(np.expm1(-log_abar[[0, last]]))  # sigma / alpha
    grid = np.linspace(*to_grid(ratio), n)
    wanted = -np.log1p(from_grid(grid) ** 2)  # ln abar
    t = np.interp(-wanted, -log_abar, np.arange(last + 1.0))
    t[0], t[-1] = 0, last  # last, so that n = 1 keeps it
    return t

  return place


_logsnr = _evenly_in(np.log, np.exp)
_karras = _evenly_in(lambda ratio: ratio ** (1 / 7), lambda grid: grid**7)


def _whole(place: Callable) -> Callable:
  """Rounds; steps that would coincide move up to the next free ones."""

  def place_whole(log_abar: np.ndarray, n: int) -> np.ndarray:
    i = np.arange(n)
    t = np.rint(place(log_abar, n)).astype(np.int64)
    t = np.maximum.accumulate(t - i) + i
    return np.minimum(t, len(log_abar) - n + i)

  return place_whole


SPACINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
  "uniform": _uniform,
  "ddim": _ddim,
  "trailing": _trailing,
  "logsnr": _whole(_logsnr),
  "karras": _whole(_karras),
  "logsnr_exact": _logsnr,
}


def parse(respacing: int | str, total: int) -> tuple[str, int]:
  """(spacing, n) of N or "N", which are uniform, and of names such as "ddimN".

  Raises:
    UserError: not understood, or n is not one of `total` steps.
  """
  match = re.fullmatch(r"([a-z_]*)(-?\d+)", str(respacing))
  name, n = (match[1] or "uniform", int(match[2])) if match else ("", 0)
  if name not in SPACINGS:
    raise UserError(
      f"{respacing=} is not understood; allowed: N or 'N', "
      + ", ".join(f"'{s}N'" for s in SPACINGS if s != "uniform")
    )
  if not 1 <= n <= total:
    raise UserError(
      f"{respacing=}: the number of steps must be from 1 to {total}"
    )
  return name, n
