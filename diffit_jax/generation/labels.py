"""Which class each sample is of."""

import numpy as np

from diffit_jax.errors import UserError


def choose_labels(
  index: np.ndarray, seed: int, num_classes: int, labels: str = "random"
) -> np.ndarray:
  """The class of each sample, a function of (seed, sample index).

  Args:
    index: [n] sample indices.
    seed: seed of the sampler's run.
    num_classes: 0 for an unconditional model.
    labels: "random", uniform and independent per sample, or classes such as
      "3", "0,1,2" or "0-9", dealt out in turn.

  Returns:
    [n] int32; all 0 for an unconditional model.

  Raises:
    UserError: labels for an unconditional model, or out of range.
  """
  if labels == "random":
    draw = lambda i: np.random.Generator(
      np.random.Philox(key=[seed, int(i)])
    ).integers(max(num_classes, 1))
    return np.array([draw(i) for i in index], np.int32)
  if not num_classes:
    raise UserError(
      f"labels={labels} were asked of an unconditional model: leave them out"
    )
  try:
    classes = []
    for part in labels.split(","):
      first, _, last = part.partition("-")
      classes.extend(range(int(first), int(last or first) + 1))
  except ValueError as error:
    raise UserError(
      f"labels={labels!r}: write classes as 3, 0,1,2 or 0-9, or random"
    ) from error
  if not classes or max(classes) > num_classes or min(classes) < 0:
    raise UserError(
      f"labels={labels} go beyond the model's classes 0..{num_classes - 1}, and"
      f" {num_classes} for no class"
    )
  return np.asarray(classes, np.int32)[np.asarray(index) % len(classes)]
