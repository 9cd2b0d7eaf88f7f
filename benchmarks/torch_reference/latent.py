"""Latent DiffiT in PyTorch, with the state dict of the released weights."""

import math

import torch
from torch import nn
import torch.nn.functional as F

from benchmarks.torch_reference.blocks import Block


class TimestepEmbedder(nn.Module):
  def __init__(self, width, frequency_dim):
    super().__init__()
    self.mlp = nn.Sequential(
      nn.Linear(frequency_dim, width), nn.SiLU(), nn.Linear(width, width)
    )
    half = frequency_dim // 2
    exponents = -math.log(10000) * torch.arange(half) / half
    self.register_buffer("frequencies", exponents.exp(), persistent=False)

  def forward(self, t):
    angles = t.float()[:, None] * self.frequencies
    return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class LatentDiffiT(nn.Module):
  """(x [b, c, h, w], t [b], labels [b]) -> [b, 2c, h, w]."""

  def __init__(self, side, width, depth, num_heads, num_classes):
    super().__init__()
    self.grid = side // 2
    self.pos_embed = nn.Parameter(
      torch.zeros(1, self.grid**2, width), requires_grad=False
    )
    self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, width, 2, 2)})
    self.t_embedder = TimestepEmbedder(width, 256)
    self.y_embedder = nn.ModuleDict(
      {"embedding_table": nn.Embedding(num_classes + 1, width)}
    )
    self.blocks = nn.ModuleList(
      Block(width, width, num_heads, self.grid) for _ in range(depth)
    )
    self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, 4 * 8)})

  def forward(self, x, t, labels):
    b, g = len(x), self.grid
    x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)
    x = (x + self.pos_embed).view(b, g, g, -1)
    time = self.t_embedder(t) + self.y_embedder["embedding_table"](labels)
    for block in self.blocks:
      x = block(x, time)
    x = F.silu(F.layer_norm(x, x.shape[-1:], eps=1e-6))
    x = self.final_layer["linear"](x).view(b, g, g, 2, 2, 8)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, 8, 2 * g, 2 * g)
