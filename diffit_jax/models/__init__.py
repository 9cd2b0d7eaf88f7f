"""Both DiffiT networks as linen modules, functions of arrays alone."""

from diffit_jax.models.image import ImageDiffiT

__all__ = ["ImageDiffiT"]
