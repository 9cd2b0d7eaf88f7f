"""How good samples are: FID and what goes with it."""

from diffit_jax.evaluation.features.extractor import load_inception

__all__ = ["load_inception"]
