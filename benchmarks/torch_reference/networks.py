"""Answers the calls of a benchmark with the PyTorch networks.

`python -m benchmarks.torch_reference.networks`; see benchmarks/worker.py.
Tensors travel in safetensors files, channels last as on our side.
"""

import functools
import os
import time

from safetensors.torch import load_file, save_file
import torch

from benchmarks import worker
from benchmarks.torch_reference import blocks, losses
from benchmarks.torch_reference.image import ImageDiffiT
from benchmarks.torch_reference.latent import LatentDiffiT


def channels_first(x):
  return x.permute(0, 3, 1, 2).contiguous()


class Networks:
  """The one network that is loaded, and what training it needs."""

  def load(self, kind, path, **sizes):
    """Makes a "latent" or "image" network and reads its weights."""
    self.free()
    self.kind = kind
    if kind == "latent":
      self.network = LatentDiffiT(**sizes)
      self.network.load_state_dict(load_file(path))
    else:
      self.network = ImageDiffiT(**sizes).load_native(load_file(path))
    return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

  def free(self):
    self.network = None
    self.stop()

  def stop(self):
    """Forgets what training needs beside the weights, and gives it back."""
    self.optimizer = self.ema = self.trained = None
    worker.give_memory_back()

  def attention(self, name):
    blocks.Attention.use_sdpa = {"eager": False, "sdpa": True}[name]

  def forward(self, inputs, attention, output=None):
    """Seconds of a forward pass, which may be written to a file."""
    self.attention(attention)
    self.network.eval()
    x = self._read(inputs)
    with torch.inference_mode():
      start = time.perf_counter()
      out = self._apply(x)
      took = time.perf_counter() - start
    if output:
      out = out.permute(0, 2, 3, 1).contiguous()
      save_file({"out": out.clone()}, output)
    return took

  def gradient(self, inputs, attention, output, names):
    """Losses [b], and the gradient of their mean for some parameters."""
    self.attention(attention)
    self.network.eval()
    each = self._losses(self._read(inputs))
    each.mean().backward()
    found = dict(self.network.named_parameters())
    tensors = {name: found[name].grad.contiguous() for name in names}
    save_file({"losses": each.detach(), **tensors}, output)
    self.network.zero_grad(set_to_none=True)

  def step(self, inputs, attention, lr, decay):
    """Seconds of one step: draws, loss, gradient, AdamW, average."""
    self.attention(attention)
    self.network.train()
    batch = self._read(inputs)
    if self.optimizer is None:
      self._start(lr)
    start = time.perf_counter()
    self._losses(self._draw(batch)).mean().backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.trained, 1 - decay)
    return time.perf_counter() - start

  def _start(self, lr):
    self.trained = [p for p in self.network.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(
      self.trained, lr=lr, weight_decay=0.0, fused=True
    )
    self.ema = [p.detach().clone() for p in self.trained]

  def _read(self, path):
    return {
      name: channels_first(x) if x.dim() == 4 else x
      for name, x in load_file(path).items()
    }

  def _draw(self, batch):
    """The batch with new random numbers in place of those of the file."""
    x = batch["x"]
    noise = torch.randn_like(x)
    if self.kind == "latent":
      t = torch.randint(0, 1000, (len(x),))
      return {**batch, "t": t, "noise": noise}
    sigma = (-1.2 + 1.2 * torch.randn(len(x))).exp()
    return {**batch, "sigma": sigma, "noise": noise}

  def _apply(self, b):
    if self.kind == "latent":
      return self.network(b["x"], b["t"], b["labels"])
    return self.network(b["x"], b["sigma"].log() / 4, b["augment_labels"])

  def _losses(self, b):
    if self.kind == "latent":
      return losses.adm_loss(
        self.network, b["x"], b["t"], b["labels"], b["noise"]
      )
    return losses.edm_loss(
      self.network, b["x"], b["sigma"], b["noise"], b["augment_labels"]
    )


class Attentions:
  """TMSA modules on their own, for benchmarks/attention.py."""

  def load(self, path, width, num_heads, side, window):
    tensors = load_file(path)
    self.x, self.time = tensors.pop("x"), tensors.pop("time")
    self.window = None if window >= side else window
    self.module = blocks.Attention(
      width, tensors["qkv_temb.weight"].shape[1], num_heads, window
    )
    self.module.load_state_dict(tensors, strict=False)

  def run(self, attention, backward, output=None):
    """Seconds of one pass, or of one and its gradient."""
    blocks.Attention.use_sdpa = attention == "sdpa"
    x = self.x.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
      start = time.perf_counter()
      out = self.module(x, self.time, self.window)
      if backward:
        out.square().sum().backward()
      took = time.perf_counter() - start
    if output:
      save_file({"out": out.detach().contiguous()}, output)
    self.module.zero_grad(set_to_none=True)
    self.x.grad = None
    return took


@functools.lru_cache(maxsize=1)
def operands(tokens, inputs, outputs):
  """Input, weight and gradient of a linear map; made once for its turns."""
  shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
  return [torch.randn(*shape) for shape in shapes]


def product(product, **sizes):
  """Seconds of one of its three products."""
  x, weight, g = operands(**sizes)
  left, right = {
    "output": (x, weight.T),
    "gradient of the input": (g, weight),
    "gradient of the kernel": (g.T, x),
  }[product]
  start = time.perf_counter()
  left @ right
  return time.perf_counter() - start


def main():
  torch.set_num_threads(os.cpu_count())
  networks, attentions = Networks(), Attentions()
  commands = {
    name: getattr(networks, name)
    for name in ("load", "free", "forward", "gradient", "step", "stop")
  }
  commands["load_attention"] = attentions.load
  commands["run_attention"] = attentions.run
  commands["product"] = product
  worker.serve({"version": f"torch {torch.__version__}"}, commands)


if __name__ == "__main__":
  main()
