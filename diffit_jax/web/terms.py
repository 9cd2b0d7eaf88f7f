"""What the page asks of the studio, and what it is given."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
  """What one click asks for.

  Attributes:
    labels: as --labels of `sample`.
    seed, num: likewise.
    ema: an average's name, "none", or a width such as "0.08"; None is the
      run's first.
    step: checkpoint of the run; None is the newest.
    sampler: fields of config.sampler that replace the config's.
  """

  labels: str = "random"
  seed: int = 0
  num: int = 16
  ema: str | None = None
  step: int | None = None
  sampler: tuple[tuple[str, Any], ...] = ()


class Progress(NamedTuple):
  """`done` of `total` images; the samples come with the last of them."""

  done: int
  total: int
  message: str
  samples: np.ndarray | None = None  # uint8 [n, h, w, c]
  labels: np.ndarray | None = None  # [n]


class Strip(NamedTuple):
  """The clean data that a sample's network predicted on its way."""

  evaluations: np.ndarray  # [k], from 0
  levels: np.ndarray  # [k] noise levels there
  images: np.ndarray  # uint8 [k, h, w, c]


class Attention(NamedTuple):
  """What one token reads at one evaluation."""

  # Of the network, and of the one beside it if any; [side, side] each, NaN
  # outside of the token's window.
  maps: list[np.ndarray]
  bias: np.ndarray | None  # [2W - 1, 2W - 1] by (row, column) offset
  state: np.ndarray  # uint8 [h, w, c], what the network sees
