"""TMSA and the DiffiT block, equations (3)-(8), in PyTorch.

Module names are those of the released weights; see diffit_jax/models for the
equations in words. `Attention.use_sdpa` chooses between the products written
out ("eager") and `scaled_dot_product_attention`.
"""

import torch
from torch import nn
import torch.nn.functional as F


def relative_position_index(side):
  """[n, n]: row of the bias table for query token n and key token m."""
  token = torch.arange(side**2)
  row, col = token // side, token % side
  rows = row[:, None] - row + side - 1
  return rows * (2 * side - 1) + col[:, None] - col + side - 1


class Attention(nn.Module):
  """TMSA on tokens [b, n, c], the whole grid or one window of it."""

  use_sdpa = True

  def __init__(self, width, time_width, num_heads, side):
    super().__init__()
    self.num_heads = num_heads
    self.relative_position_bias_table = nn.Parameter(
      torch.zeros((2 * side - 1) ** 2, num_heads)
    )
    self.register_buffer(
      "relative_position_index", relative_position_index(side)
    )
    self.qkv = nn.Linear(width, 3 * width)
    self.qkv_temb = nn.Linear(time_width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x, time, window=None):
    """x [b, h, w, c], time [b, ct] -> [b, h, w, c]."""
    b, h, w, c = x.shape
    p = window or h
    qkv = self.qkv(x) + self.qkv_temb(time)[:, None, None]
    qkv = qkv.view(b, h // p, p, w // p, p, 3, self.num_heads, -1)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, -1, self.num_heads, p * p, qkv.shape[-1])
    bias = self.relative_position_bias_table[self.relative_position_index]
    # In order: with keys far apart, CUDA's fused kernels refuse it.
    bias = bias.permute(2, 0, 1)[None].contiguous()
    if self.use_sdpa:
      x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
      logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
      x = logits.softmax(-1) @ v
    x = x.reshape(b, h // p, w // p, self.num_heads, p, p, -1)
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, h, w, c)
    return self.proj(x)


class MLP(nn.Module):
  def __init__(self, width, hidden, dropout):
    super().__init__()
    self.fc1 = nn.Linear(width, hidden)
    self.fc2 = nn.Linear(hidden, width)
    self.dropout = dropout

  def forward(self, x):
    x = F.gelu(self.fc1(x), approximate="tanh")
    return self.fc2(F.dropout(x, self.dropout, self.training))


class Block(nn.Module):
  """Equations (7) and (8)."""

  def __init__(
    self, width, time_width, num_heads, side, window=None, dropout=0.0
  ):
    super().__init__()
    self.window = None if window is None or window >= side else window
    self.attn = Attention(width, time_width, num_heads, self.window or side)
    self.mlp = MLP(width, 4 * width, dropout)

  def forward(self, x, time):
    norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
    x = x + self.attn(norm(x), time, self.window)
    return x + self.mlp(norm(x))
