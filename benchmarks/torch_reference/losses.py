"""The training objectives in PyTorch: ADM's hybrid loss, and EDM's.

Equations and their sources are in diffit_jax/diffusion/adm.py and edm.py.
"""

import functools
import math

import torch

BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)


@functools.cache
def tables(device):
  """{name: [1000] float32}, on the device that indexes them."""
  abar = (1 - BETAS).cumprod(0)
  before = torch.cat([abar.new_ones(1), abar[:-1]])
  variance = BETAS * (1 - before) / (1 - abar)
  variance[0] = variance[1]
  c1 = BETAS * before.sqrt() / (1 - abar)
  found = {
    "signal": abar.sqrt(),
    "noise": (1 - abar).sqrt(),
    "log_beta": BETAS.log(),
    "log_variance": variance.log(),
    "mean": c1 * (1 / abar - 1).sqrt(),
  }
  return {name: table.float().to(device) for name, table in found.items()}


def _cdf(x):
  return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def adm_loss(network, x_0, t, labels, noise):
  """[b] losses of latents [b, c, h, w] with eps and v from the network."""
  at = {
    name: table[t][:, None, None, None]
    for name, table in tables(t.device).items()
  }
  out = network(at["signal"] * x_0 + at["noise"] * noise, t, labels)
  eps, v = out.chunk(2, 1)
  mse = (noise - eps).square().mean((1, 2, 3))
  f = (v + 1) / 2
  l1, l2 = at["log_variance"], f * at["log_beta"]
  l2 = l2 + (1 - f) * at["log_variance"]
  off = at["mean"] * (eps.detach() - noise)
  kl = 0.5 * (l2 - l1 + torch.expm1(l1 - l2) + off.square() * (-l2).exp())
  scale = (-0.5 * l2).exp()
  above, below = _cdf(scale * (off + 1 / 255)), _cdf(scale * (off - 1 / 255))
  mass = torch.where(x_0 > 0.999, 1 - below, above - below)
  mass = torch.where(x_0 < -0.999, above, mass)
  nll = -mass.clamp(min=1e-12).log()
  vb = torch.where((t == 0)[:, None, None, None], nll, kl).mean((1, 2, 3))
  return mse + vb / math.log(2)


def edm_loss(network, y, sigma, noise, augment_labels, sigma_data=0.5):
  """[b] losses of images [b, c, h, w]."""
  s = sigma[:, None, None, None]
  total = s.square() + sigma_data**2
  x = y + s * noise
  F = network(x / total.sqrt(), sigma.log() / 4, augment_labels)
  D = sigma_data**2 / total * x + s * sigma_data / total.sqrt() * F
  weight = total / (s * sigma_data).square()
  return (weight * (D - y).square()).sum((1, 2, 3))
