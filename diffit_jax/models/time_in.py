"""Where the time token enters a transformer block: TMSA and its alternatives.

With spatial tokens x, the time token x_t, and one linear map W of x_t at most:

  name       attention                                       MLP of
  tmsa       q, k, v of x, plus W x_t      (3)-(5), Table 6 H   LN(x^)
  rpb_time   bias B + B(W x_t), a table per sample  Table 6 F   LN(x^)
  mlp_time   without bias B and time                Table 6 G   LN(x^) + W x_t
  separate   of x alone, plus W x_t                 Table 7     LN(x^)
  plain      of x alone                             Figure 2    LN(x^)
  none       of x alone, without bias B, for baselines          LN(x^)

CHOICE: the paper describes the alternatives in a line each. A bias from time is
a whole table of relative offsets, [(2 W - 1)^2, heads] for each sample: one
number per head would cancel in the softmax. "Separate" attention on the time
token alone has one token to attend to, so that it is a linear map of it, here
added to the projected output of the spatial attention. `mlp_time` alone does
without the relative position bias.
"""

import dataclasses

from diffit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TimeIn:
  """What a linear map of the time token is added to.

  Attributes:
    qkv: queries, keys and values.
    bias_table: the table of the relative position bias.
    output: the projected output of the attention.
    mlp: the input of the MLP.
    has_bias: whether there is a relative position bias at all.
  """

  qkv: bool = False
  bias_table: bool = False
  output: bool = False
  mlp: bool = False
  has_bias: bool = True


TIME_IN = {
  "tmsa": TimeIn(qkv=True),
  "rpb_time": TimeIn(bias_table=True),
  "mlp_time": TimeIn(mlp=True, has_bias=False),
  "separate": TimeIn(output=True),
  "plain": TimeIn(),
  "none": TimeIn(has_bias=False),
}


def check_time_in(name: str, attention: str = "xla") -> None:
  """Refuses an unknown name, or one that the kernel cannot compute.

  Args:
    name: a key of TIME_IN.
    attention: name of the attention's implementation.
  """
  if name not in TIME_IN:
    raise UserError(f"model.time_in={name!r}: use one of {tuple(TIME_IN)}")
  if attention == "cudnn" and not _is_shared_bias(TIME_IN[name]):
    found = "one each" if name == "rpb_time" else "none"
    raise UserError(
      f"model.attention='cudnn' wants one bias for all samples, and"
      f" model.time_in={name!r} has {found}: use model.attention='xla'"
    )


def _is_shared_bias(entry: TimeIn) -> bool:
  return entry.has_bias and not entry.bias_table
