"""Stage `torch`: the yardstick's XL/2 on the same card.

Runs in a Python that has PyTorch, and nothing of this project but benchmarks/.
bfloat16 autocast with float32 weights, TF32 for what stays float32, as ours at
precision "default"; attention written out, or by the fastest of SDPA's forms
that takes the bias and gives its gradient; AdamW (fused) and one average.
"""

import contextlib
import functools
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as F

from benchmarks.on_device import clock, rows
from benchmarks.torch_reference import blocks, losses
from benchmarks.torch_reference.latent import LatentDiffiT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = dict(side=32, width=1152, depth=28, num_heads=16, num_classes=1000)
TINY = SIZES | dict(width=32, depth=2, num_heads=2)
# Mode of torch.compile, None for none. Without CUDA graphs: each block is a
# graph of its own, and would overwrite what the block before gave.
TUNED = "max-autotune-no-cudagraphs"
BACKENDS = ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "MATH")
TOLERANCE = 0.1  # of the bias's gradient: bfloat16 rounds to 1 in 256
# (what, attention, mode), in the order of their worth.
CASES = (
  ("forward", "sdpa", None),
  ("step", "sdpa", None),
  ("step", "eager", None),
  ("step", "sdpa", "default"),
  ("forward", "sdpa", "default"),
  ("step", "eager", "default"),
  ("step", "sdpa", TUNED),
)


def card() -> str:
  return torch.cuda.get_device_name(0) if DEVICE == "cuda" else "cpu"


def wait(_=None) -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def measure(record: rows.Record) -> None:
  torch.set_float32_matmul_precision("high")  # TF32, as ours
  torch.backends.cudnn.allow_tf32 = True
  # A batch of another size is compiled for itself, and not for any size.
  torch._dynamo.config.automatic_dynamic_shapes = False
  torch.manual_seed(0)
  batch = 2 if record.is_tiny else 64
  backend = find_backend(record, batch)
  network = Network(TINY if record.is_tiny else SIZES, batch, backend)
  for what, attention, mode in CASES:
    about = {
      "pass": what,
      "attention": attention,
      "compiled": mode or "no",
      "batch": batch,
      "precision": "bfloat16",
      "torch": torch.__version__,
    }
    run = functools.partial(network.measure, what, attention, mode)
    record.attempt("imagenet256", run, least=8 if mode is None else 20, **about)


def find_backend(record: rows.Record, batch: int) -> SDPBackend | None:
  """The fastest form of SDPA for forward pass and gradients, with the bias."""
  found = {}
  for name in BACKENDS:
    backend = getattr(SDPBackend, name)
    try:
      s, off = try_backend(backend, batch, record.is_tiny)
      columns = {"ms": 1e3 * s, "d(bias)": off}
      if off < TOLERANCE:
        found[backend] = s
    except RuntimeError as error:  # no such kernel, or none for these tensors
      columns = {"skipped": rows.first_lines(error)}
    about = {"backend": name, "batch": batch, "precision": "bfloat16"}
    record.add("SDPA with a bias", table="SDPA", **about, **columns)
  return min(found, key=found.get, default=None)


def try_backend(
  backend: SDPBackend, batch: int, is_tiny: bool
) -> tuple[float, float]:
  """A layer's attention with the gradients of q, k, v and bias.

  Returns:
    Its seconds; the error of the bias's gradient, relative to MATH.
  """
  heads, n, d = (2, 256, 16) if is_tiny else (16, 256, 72)
  draw = lambda *shape: torch.randn(
    *shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
  )
  q, k, v, g = (draw(batch, heads, n, d) for _ in range(4))
  bias = draw(1, heads, n, n)

  def run(backend):
    with sdpa_kernel(backend):
      out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
      return torch.autograd.grad(out, (q, k, v, bias), g.detach())

  exact, found = (run(x)[-1].float() for x in (SDPBackend.MATH, backend))
  off = ((found - exact).norm() / exact.norm()).item()
  return clock.seconds_per_call(lambda: run(backend), wait), off


class Network:
  """The network, its optimizer and average, and one batch."""

  def __init__(self, sizes: dict, batch: int, backend: SDPBackend | None):
    self.batch, self.backend, self.mode = batch, backend, None
    self.network = LatentDiffiT(**sizes).to(DEVICE)
    with torch.no_grad():
      for p in self.network.parameters():
        if p.dim() > 1:
          p.normal_(0, p[0].numel() ** -0.5)
    self.trained = [p for p in self.network.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(
      self.trained, lr=3e-4, weight_decay=0.0, fused=True
    )
    self.ema = [p.detach().clone() for p in self.trained]
    self.x = torch.randn(batch, 4, 32, 32, device=DEVICE)
    self.labels = torch.randint(0, 1001, (batch,), device=DEVICE)

  def measure(self, what: str, attention: str, mode: str | None) -> dict:
    """Columns of one row."""
    blocks.Attention.use_sdpa = attention == "sdpa"
    self._compile(mode)
    self.network.train(what == "step")
    if DEVICE == "cuda":
      torch.cuda.reset_peak_memory_stats()
    run = {"forward": self.forward, "step": self.step}[what]
    start = time.perf_counter()
    run(), wait()
    first = time.perf_counter() - start
    s = clock.seconds_per_call(run, wait, at_least=1.0)
    peak, sdpa = None, None
    if DEVICE == "cuda":
      peak = torch.cuda.max_memory_allocated() / 2**30
    if attention == "sdpa" and self.backend is not None:
      sdpa = self.backend.name
    return {
      "SDPA": sdpa,
      "ms": 1e3 * s,
      "images/s": self.batch / s,
      "first call s": first,
      "peak GiB": peak,
    }

  def _compile(self, mode: str | None) -> None:
    """Compiles the blocks, which are all one graph, where the mode is new."""
    if mode == self.mode:
      return
    torch.compiler.reset()
    for block in self.network.blocks:
      block.compile(mode=mode)
    self.mode = mode

  @contextlib.contextmanager
  def _as_asked(self):
    """Autocast, and the chosen form of SDPA."""
    kernel = contextlib.nullcontext()
    if self.backend is not None:
      kernel = sdpa_kernel(self.backend)
    with torch.autocast(DEVICE, torch.bfloat16), kernel:
      yield

  def forward(self):
    t = torch.full((self.batch,), 500, device=DEVICE)
    with torch.inference_mode(), self._as_asked():
      return self.network(self.x, t, self.labels)

  def step(self):
    """Draws, loss, gradient, AdamW, average."""
    noise = torch.randn_like(self.x)
    t = torch.randint(0, 1000, (self.batch,), device=DEVICE)
    apply = lambda *args: self.network(*args).float()
    with self._as_asked():
      loss = losses.adm_loss(apply, self.x, t, self.labels, noise).mean()
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.trained, 1 - 0.9999)
