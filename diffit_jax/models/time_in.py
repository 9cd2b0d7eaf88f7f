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


@dataclasses.dataclass(frozen=True)
class TimeIn:
  """What a linear map of the time token is added to.

  Attributes:
    qkv: queries, keys and values.
    output: the projected output of the attention.
    mlp: the input of the MLP.
    bias: relative position bias, "shared" by all samples; "each" sample has
      one, from a table that time is added to; or "none".
  """

  qkv: bool = False
  output: bool = False
  mlp: bool = False
  bias: str = "shared"

  @property
  def in_attention(self) -> bool:
    """Whether time enters the attention at all."""
    return self.qkv or self.output or self.bias == "each"


TIME_IN = {
  "tmsa": TimeIn(qkv=True),
  "rpb_time": TimeIn(bias="each"),
  "mlp_time": TimeIn(mlp=True, bias="none"),
  "separate": TimeIn(output=True),
  "plain": TimeIn(),
  "none": TimeIn(bias="none"),
}
