"""From features to scores: plain functions of arrays, in float64."""

from diffit_jax.evaluation.metrics.distances import (
  InceptionScore,
  frechet_distance,
  inception_score,
  kernel_inception_distance,
  kid_blocks,
  precision_recall,
)

__all__ = [
  "InceptionScore",
  "frechet_distance",
  "inception_score",
  "kernel_inception_distance",
  "kid_blocks",
  "precision_recall",
]
