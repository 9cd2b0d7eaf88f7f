"""How good samples are: FID and the other metrics.

  sets      what is compared: images from all sources, samples, references
  features  from images to numbers: the Inception and other feature spaces
  metrics   from numbers to scores: one table

These know nothing of each other. The modules beside them join the three:
`measure` and `scoring` make a card, `in_loop` does so while a run trains.
"""

__all__ = ["load_inception"]


def __getattr__(name: str):
  if name != "load_inception":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from diffit_jax.evaluation.features.extractor import load_inception

  return load_inception
