"""The FID Inception in PyTorch, as a yardstick: what a user would run.

For `benchmarks/inception.py`. Convolution, batch normalisation and ReLU are
three modules, in PyTorch's default layout.
"""

import os
import time

from safetensors.torch import load_file, save_file
import torch
from torch import nn
import torch.nn.functional as F

from benchmarks import worker


class Unit(nn.Module):
  """Convolution, batch normalisation, ReLU."""

  def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
    super().__init__()
    self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(c_out, eps=0.001)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def across(c_in, c_out):
  return Unit(c_in, c_out, (1, 7), padding=(0, 3))


def down(c_in, c_out):
  return Unit(c_in, c_out, (7, 1), padding=(3, 0))


def mean(x):
  return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(nn.Module):
  def __init__(self, c, pooled):
    super().__init__()
    self.branch1x1 = Unit(c, 64, 1)
    self.branch5x5_1 = Unit(c, 48, 1)
    self.branch5x5_2 = Unit(48, 64, 5, padding=2)
    self.branch3x3dbl_1 = Unit(c, 64, 1)
    self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
    self.branch_pool = Unit(c, pooled, 1)

  def forward(self, x):
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat(
      [
        self.branch1x1(x),
        self.branch5x5_2(self.branch5x5_1(x)),
        self.branch3x3dbl_3(double),
        self.branch_pool(mean(x)),
      ],
      1,
    )


class B(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.branch3x3 = Unit(c, 384, 3, 2)
    self.branch3x3dbl_1 = Unit(c, 64, 1)
    self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
    self.branch3x3dbl_3 = Unit(96, 96, 3, 2)

  def forward(self, x):
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    pooled = F.max_pool2d(x, 3, 2)
    return torch.cat(
      [self.branch3x3(x), self.branch3x3dbl_3(double), pooled], 1
    )


class C(nn.Module):
  def __init__(self, c7):
    super().__init__()
    self.branch1x1 = Unit(768, 192, 1)
    self.branch7x7_1 = Unit(768, c7, 1)
    self.branch7x7_2 = across(c7, c7)
    self.branch7x7_3 = down(c7, 192)
    self.branch7x7dbl_1 = Unit(768, c7, 1)
    self.branch7x7dbl_2 = down(c7, c7)
    self.branch7x7dbl_3 = across(c7, c7)
    self.branch7x7dbl_4 = down(c7, c7)
    self.branch7x7dbl_5 = across(c7, 192)
    self.branch_pool = Unit(768, 192, 1)

  def forward(self, x):
    double = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
    double = self.branch7x7dbl_4(self.branch7x7dbl_3(double))
    return torch.cat(
      [
        self.branch1x1(x),
        self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
        self.branch7x7dbl_5(double),
        self.branch_pool(mean(x)),
      ],
      1,
    )


class D(nn.Module):
  def __init__(self):
    super().__init__()
    self.branch3x3_1 = Unit(768, 192, 1)
    self.branch3x3_2 = Unit(192, 320, 3, 2)
    self.branch7x7x3_1 = Unit(768, 192, 1)
    self.branch7x7x3_2 = across(192, 192)
    self.branch7x7x3_3 = down(192, 192)
    self.branch7x7x3_4 = Unit(192, 192, 3, 2)

  def forward(self, x):
    seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
    return torch.cat(
      [
        self.branch3x3_2(self.branch3x3_1(x)),
        self.branch7x7x3_4(self.branch7x7x3_3(seven)),
        F.max_pool2d(x, 3, 2),
      ],
      1,
    )


class E(nn.Module):
  def __init__(self, c, pool):
    super().__init__()
    self.pool = pool
    self.branch1x1 = Unit(c, 320, 1)
    self.branch3x3_1 = Unit(c, 384, 1)
    self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
    self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
    self.branch3x3dbl_1 = Unit(c, 448, 1)
    self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
    self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
    self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
    self.branch_pool = Unit(c, 192, 1)

  def forward(self, x):
    single = self.branch3x3_1(x)
    double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    return torch.cat(
      [
        self.branch1x1(x),
        self.branch3x3_2a(single),
        self.branch3x3_2b(single),
        self.branch3x3dbl_3a(double),
        self.branch3x3dbl_3b(double),
        self.branch_pool(self.pool(x)),
      ],
      1,
    )


class Inception(nn.Module):
  """[b, 3, 299, 299] normalised images to the features [b, 2048]."""

  def __init__(self):
    super().__init__()
    self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
    self.Conv2d_2a_3x3 = Unit(32, 32, 3)
    self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
    self.Conv2d_3b_1x1 = Unit(64, 80, 1)
    self.Conv2d_4a_3x3 = Unit(80, 192, 3)
    self.Mixed_5b = A(192, 32)
    self.Mixed_5c = A(256, 64)
    self.Mixed_5d = A(288, 64)
    self.Mixed_6a = B(288)
    self.Mixed_6b = C(128)
    self.Mixed_6c = C(160)
    self.Mixed_6d = C(160)
    self.Mixed_6e = C(192)
    self.Mixed_7a = D()
    self.Mixed_7b = E(1280, mean)
    self.Mixed_7c = E(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
    self.fc = nn.Linear(2048, 1008)

  def forward(self, x):
    x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))
    x = F.max_pool2d(self.Conv2d_2b_3x3(x), 3, 2)
    x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
    x = F.max_pool2d(x, 3, 2)
    x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
    x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
    x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
    return self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))


class Yardstick:
  """Answers the calls; see benchmarks/worker.py."""

  def load(self, weights, images):
    """Reads a state dict, and images [b, 299, 299, 3], from safetensors."""
    network = Inception().eval()
    found = network.load_state_dict(load_file(weights), strict=False)
    missing = [k for k in found.missing_keys if "num_batches" not in k]
    if missing or found.unexpected_keys:
      raise ValueError(f"missing {missing}, unknown {found.unexpected_keys}")
    self.network = network
    self.images = load_file(images)["x"].permute(0, 3, 1, 2).contiguous()

  @torch.inference_mode()
  def run(self, output=None):
    """Seconds of one forward pass, whose features may be written to a file."""
    start = time.perf_counter()
    features = self.network(self.images)
    took = time.perf_counter() - start
    if output:
      save_file({"features": features.clone()}, output)
    return took


def main():
  torch.set_num_threads(os.cpu_count())
  yardstick = Yardstick()
  commands = {"load": yardstick.load, "run": yardstick.run}
  worker.serve({"version": f"torch {torch.__version__}"}, commands)


if __name__ == "__main__":
  main()
