"""What a token reads, in a network and in another one beside it."""

import jax
import numpy as np

from diffit_jax import models, pictures
from diffit_jax.errors import UserError
from diffit_jax.generation import attention_maps
from diffit_jax.models.compute import PLAIN
from diffit_jax.web.terms import Attention


class Attentions:
  """The attentions of a network, and of one with the same blocks and tokens.

  Attributes:
    blocks: their names, in the order of the network.
    titles: names of the network and, where there is one, of the other: of its
      config or, where both have the same, where it came from.
  """

  def __init__(self, loaded, beside, path: str | None):
    """
    Args:
      loaded: the network, as `generation.weights` loads it.
      beside: the other one, which sees the same, loaded likewise; or None.
      path: where that came from.

    Raises:
      UserError: the other has other blocks, tokens or heads.
    """
    self._look, self._shapes = _compile(loaded)
    self.blocks = sorted(self._shapes, key=attention_maps.network_order)
    self.titles, self._beside = [loaded.config.name], beside
    if beside is not None:
      self._look_beside, shapes = _compile(beside)
      _check_alike(path, shapes, self._shapes)
      name = beside.config.name
      self.titles.append(name if name not in self.titles else str(path))

  def num_heads(self, block: str) -> int:
    return self._shapes[block][0]

  def side(self, block: str) -> int:
    """Side of the block's map of tokens."""
    return self._shapes[block][1]

  def check(self, block: str, token: tuple[int, int], head: int | None) -> None:
    """Refuses a token or a head that the block does not have."""
    heads, side = self._shapes[block]
    if not all(0 <= place < side for place in token):
      raise UserError(f"{token=} is not on the map of {side} x {side} tokens")
    if head is not None and not 0 <= head < heads:
      raise UserError(f"{head=} must be from 0 to {heads - 1}")

  def read(
    self, params, x, level, labels, block: str, token, head: int | None
  ) -> Attention:
    """What a token of a block reads.

    Args:
      params: of the network.
      x, level, labels: [1] what it sees; labels are None without classes.
      block: one of `blocks`.
      token: its row and column, from 0.
      head: one head; None is the mean of all.
    """
    maps = [
      _map(look(weights, x, level, labels)[block], token, head)
      for look, weights in self._networks(params)
    ]
    return Attention(
      maps,
      attention_maps.bias_map(params, block, head),
      pictures.stretched(np.asarray(x[0])),
    )

  def _networks(self, params) -> list[tuple]:
    """(compiled look, parameters) of each."""
    own = [(self._look, params)]
    if self._beside is None:
      return own
    return [*own, (self._look_beside, self._beside.params)]


def _compile(loaded) -> tuple:
  """Of a network: its attention, compiled, and {block: (heads, side)}."""
  config, side = loaded.config, loaded.config.data.resolution
  model = models.make_model(config.model).clone(attention=PLAIN)

  @jax.jit
  def look(params, x, level, labels):
    return attention_maps.attention_weights(model, config, labels)(
      params, x, level
    )

  x = jax.ShapeDtypeStruct((1, side, side, config.model.channels), "float32")
  one = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
  labels = one("int32") if config.model.num_classes else None
  found = jax.eval_shape(look, loaded.params, x, one("float32"), labels)
  return look, {
    name: (a.shape[2], round((a.shape[1] * a.shape[3]) ** 0.5))
    for name, a in found.items()
  }


def _check_alike(path: str, other: dict, own: dict) -> None:
  """Refuses a network whose maps cannot be laid beside the others."""
  if other.keys() != own.keys():
    raise UserError(
      f"--beside={path} has {len(other)} blocks with attention"
      f" ({', '.join(sorted(other))}) and this network {len(own)}"
      f" ({', '.join(sorted(own))}): both are to have the same"
    )
  for block, (heads, side) in own.items():
    if other[block] != (heads, side):
      raise UserError(
        f"--beside={path} has {other[block][0]} heads and a map of"
        f" {other[block][1]} x {other[block][1]} tokens in {block}, and this"
        f" network {heads} and {side} x {side}: both are to have the same"
      )


def _map(weights, token: tuple[int, int], head: int | None) -> np.ndarray:
  """[side, side] of weights [1, windows, heads, n, n]."""
  by_head = np.asarray(weights)[0]
  chosen = by_head.mean(1) if head is None else by_head[:, head]
  return attention_maps.token_map(chosen, token)
