"""From features to scores: plain functions of arrays, in float64.

The functions are imported when they are asked for: `table` is read by programs
that compute nothing.
"""

import importlib

_FILES = {
  "frechet_distance": "frechet",
  "inception_score": "logit_score",
  "kernel_inception_distance": "kernel",
  "precision_recall": "neighbours",
}
__all__ = list(_FILES)  # noqa: PLE0604


def __getattr__(name: str):
  if name not in _FILES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
