"""Image-space DiffiT of configs/ffhq64.py in PyTorch.

Loaded from this project's own layout: names joined by "/", kernels [in, out]
and [row, column, in, out]. Images and tokens are kept with the channels last,
so that turning one into the other moves nothing.
"""

import torch
from torch import nn
import torch.nn.functional as F

from benchmarks.torch_reference.blocks import Block


def norm(width):
  return nn.GroupNorm(max(min(32, width // 4), 1), width, eps=1e-6)


class ResBlock(nn.Module):
  """Equations (9) and (10)."""

  def __init__(self, c_in, width, time_dim, side, window, dropout):
    super().__init__()
    self.norm = norm(c_in)
    self.conv = nn.Conv2d(c_in, width, 3, padding=1)
    if c_in != width:
      self.skip = nn.Conv2d(c_in, width, 1)
    self.block = Block(width, time_dim, width // 64, side, window, dropout)

  def forward(self, x, time):
    h = self.conv(F.silu(self.norm(x)))
    x = self.skip(x) if hasattr(self, "skip") else x
    h = self.block(h.permute(0, 2, 3, 1), time)
    return h.permute(0, 3, 1, 2) + x


class NoiseEmbedding(nn.Module):
  def __init__(self, width, time_dim, augment_dim):
    super().__init__()
    self.width = width
    self.map_augment = nn.Linear(augment_dim, width, bias=False)
    self.map_layer0 = nn.Linear(width, time_dim)
    self.map_layer1 = nn.Linear(time_dim, time_dim)

  def forward(self, c_noise, augment_labels):
    half = self.width // 2
    frequencies = 10000.0 ** (-torch.arange(half) / (half - 1))
    angles = c_noise[:, None] * frequencies
    x = torch.cat([angles.sin(), angles.cos()], -1)
    x = x + self.map_augment(augment_labels)
    return F.silu(self.map_layer1(F.silu(self.map_layer0(x))))


class ImageDiffiT(nn.Module):
  """(x [b, 3, h, w], c_noise [b], augment_labels) -> [b, 3, h, w]."""

  def __init__(self, side, base, mult, depth, window, dropout):
    super().__init__()
    widths = [base * m for m in mult]
    time_dim = 4 * base
    self.embedding = NoiseEmbedding(base, time_dim, 9)
    self.tokenizer = nn.Conv2d(3, base, 3, padding=1)
    self.levels, self.depth = len(mult), depth
    width = base
    make = lambda c_in, c_out, level: ResBlock(
      c_in, c_out, time_dim, side >> level, window, dropout
    )
    for level, out in enumerate(widths):
      if level:
        down = nn.Conv2d(width, width, 3, 2, padding=1)
        self.add_module(f"encoder_{level}_down", down)
      for i in range(depth):
        self.add_module(f"encoder_{level}_block_{i}", make(width, out, level))
        width = out
    for level in reversed(range(self.levels - 1)):
      up = nn.Conv2d(width, width, 3, padding=1)
      self.add_module(f"decoder_{level}_up", up)
      width += widths[level]  # the encoder's output beside it
      for i in range(depth):
        block = make(width, widths[level], level)
        self.add_module(f"decoder_{level}_block_{i}", block)
        width = widths[level]
    self.head_norm = norm(width)
    self.head = nn.Conv2d(width, 3, 3, padding=1)

  def forward(self, x, c_noise, augment_labels):
    time = self.embedding(c_noise, augment_labels)
    h = self.tokenizer(x.contiguous(memory_format=torch.channels_last))
    skips = []
    for level in range(self.levels):
      if level:
        h = self.get_submodule(f"encoder_{level}_down")(h)
      for i in range(self.depth):
        h = self.get_submodule(f"encoder_{level}_block_{i}")(h, time)
      skips.append(h)
    for level in reversed(range(self.levels - 1)):
      h = F.interpolate(h, scale_factor=2, mode="nearest")
      h = self.get_submodule(f"decoder_{level}_up")(h)
      h = torch.cat([h, skips[level]], 1)
      for i in range(self.depth):
        h = self.get_submodule(f"decoder_{level}_block_{i}")(h, time)
    return self.head(F.silu(self.head_norm(h)))

  def load_native(self, tensors):
    """Fills the parameters from {"a/b/kernel": [in, out]}, all of them."""
    state = {}
    for name, value in tensors.items():
      *path, leaf = name.split("/")
      if leaf == "kernel":
        order = (3, 2, 0, 1) if value.dim() == 4 else (1, 0)
        value = value.permute(order).contiguous()
      leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
      state[".".join([*path, leaf])] = value
    missing, unknown = self.load_state_dict(state, strict=False)
    missing = [n for n in missing if "relative_position_index" not in n]
    if missing or unknown:
      raise ValueError(f"missing {missing}, unknown {unknown}")
    return self.to(memory_format=torch.channels_last)
