"""Checks of images before they are scored."""

from absl import logging
import numpy as np

from diffit_jax.errors import UserError


class Guard:
  """Refuses images that no sampler and no camera makes.

  An image of one colour is what NaN becomes in 8 bits; a set that never exceeds
  1 was in [0, 1] when it was cast to 8 bits.

  Attributes:
    constant: indices of the images of one colour.
    maximum: largest value; -1 if nothing was seen.
  """

  def __init__(self, what: str, refuse: bool = True):
    """Begins.

    Args:
      what: the set's name, for messages.
      refuse: whether images of one colour are an error; real data may hold
        some, and then a warning gives their number. A maximum of 1 is always
        an error.
    """
    self._what, self._refuse = what, refuse
    self.constant: set[int] = set()
    self.maximum = -1

  def see(self, images: np.ndarray, index: np.ndarray | int) -> None:
    """Checks some images; the same one may come again.

    Args:
      images: uint8 [k, h, w, c].
      index: [k] index of each image in the set; or that of the first, if the
        others follow it.

    Raises:
      UserError: some are of one colour, and `refuse` is set.
    """
    if not len(images):
      return
    self.maximum = max(self.maximum, int(images.max()))
    is_constant = (images == images[:, :1, :1]).all(axis=(1, 2, 3))
    if not is_constant.any():
      return
    index = np.asarray(index)
    index = index if index.ndim else index + np.arange(len(images))
    found = sorted(set(index[is_constant].tolist()))
    self.constant.update(found)
    if self._refuse:
      colour = images[is_constant.argmax(), 0, 0].tolist()
      raise UserError(
        f"image {found[0]} of {self._what} is of one colour, {colour},"
        f" throughout ({len(found)} of the {len(images)} images that were read"
        " with it are): NaN becomes that in 8 bits, so look at what made them"
      )

  def finish(self) -> None:
    """Checks what only the complete set shows.

    Raises:
      UserError: no value of it exceeds 1.
    """
    if 0 <= self.maximum <= 1:
      raise UserError(
        f"no value in the images of {self._what} exceeds {self.maximum}: they"
        " were in [0, 1] when they were cast to 8 bits, or are black; scale"
        " them to 0..255 before the cast"
      )
    if self.constant:
      logging.warning(
        "%d images of %s are of one colour throughout, the first being %d",
        len(self.constant),
        self._what,
        min(self.constant),
      )
