"""What a network's attentions read: the softmax of equation (6), by block.

Figure 2 of the paper shows it for the centre token along a sample's way.
"""

from collections.abc import Callable, Mapping

from flax import linen as nn
from flax import traverse_util
import jax
from ml_collections import config_dict
import numpy as np

from diffit_jax.diffusion import kinds
from diffit_jax.models import attention, latent
from diffit_jax.models.kernels import plain

_TABLE = "relative_position_bias_table"


def attention_weights(
  model: nn.Module, config: config_dict.ConfigDict, labels
) -> Callable[..., dict[str, jax.Array]]:
  """(params, x, level) -> {block: softmax of (6), [b, windows, heads, n, n]}.

  The network runs as it samples; each attention leaves its q, k and bias, of
  which the weights are made again.

  Args:
    model: the network.
    config: its config.
    labels: [b], or None.
  """
  if config.model.get("scan_blocks"):
    model = model.clone(scan_blocks=False)

  def run(params, x, level):
    if config.model.get("scan_blocks"):
      params = latent.unstack_blocks(params)
    found = {}

    def network(x, level):
      out, left = model.apply(
        {"params": params}, x, level, labels, mutable=["intermediates"]
      )
      found.update(_flatten(left["intermediates"]))
      return out

    kinds.make(config.diffusion).denoise(network, x, level)
    return {
      name: plain.attention_weights(*inputs) for name, inputs in found.items()
    }

  return run


def _flatten(left: Mapping, prefix: str = "") -> dict[str, tuple]:
  """{block: (q, k, bias)} of what all attentions left."""
  found = {}
  for name, value in left.items():
    if name == attention.INPUTS:
      found[prefix.partition("/")[0]] = value[0]
    else:
      found |= _flatten(value, f"{prefix}/{name}" if prefix else name)
  return found


def network_order(block: str) -> tuple:
  """Sorts encoder_0_block_0, ..., decoder_0_block_1; and blocks_0, blocks_1."""
  part, *numbers = block.split("_")
  numbers = [int(number) for number in numbers if number.isdigit()]
  if part == "decoder":
    return 1, -numbers[0], *numbers[1:]
  return 0, *numbers


def token_map(weights: np.ndarray, token: tuple[int, int]) -> np.ndarray:
  """What one token reads.

  Args:
    weights: [windows, n, n], windows and tokens numbered along rows.
    token: its row and column in the whole map.

  Returns:
    [side, side]; NaN outside of the token's window.
  """
  windows, n, _ = weights.shape
  across, window = round(windows**0.5), round(n**0.5)
  (down, y), (right, x) = (divmod(place, window) for place in token)
  read = weights[down * across + right, y * window + x]
  out = np.full([across * window] * 2, np.nan)
  rows, columns = down * window, right * window
  out[rows : rows + window, columns : columns + window] = read.reshape(
    window, window
  )
  return out


def centre_map(weights: np.ndarray) -> np.ndarray:
  """What the centre token reads, the mean over heads.

  Args:
    weights: [windows, heads, n, n].

  Returns:
    [side, side], see `token_map`.
  """
  centre = round((weights.shape[0] * weights.shape[-1]) ** 0.5) // 2
  return token_map(weights.mean(1), (centre, centre))


def bias_map(
  params: Mapping, block: str, head: int | None = None
) -> np.ndarray | None:
  """The learned bias B of a block by offset, of one head or the mean of all.

  Args:
    params: the network's.
    block: name of the block, as of `attention_weights`.
    head: its number; None is the mean.

  Returns:
    [2W - 1, 2W - 1] by (row, column) from query to key, or None where the
    block's attention has no bias.
  """
  if latent.STACKED in params:
    params = latent.unstack_blocks(jax.device_get(params))
  flat = traverse_util.flatten_dict(dict(params.get(block, {})), sep="/")
  tables = [x for name, x in flat.items() if name.endswith(_TABLE)]
  if not tables:
    return None
  table = np.asarray(tables[0])
  column = table.mean(1) if head is None else table[:, head]
  side = round(len(column) ** 0.5)
  return column.reshape(side, side)
