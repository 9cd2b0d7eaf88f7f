"""What accelerators promise: dense bfloat16 products, FLOP/s, by datasheet."""

import re

from diffit_jax.planning.topology import CHIPS

# Pattern of the whole name that JAX and PyTorch give -> FLOP/s. Cards of the
# same letters and another form (PCIe, NVL) are slower and not listed.
_PEAKS = {
  r"NVIDIA H100 80GB HBM3": 989e12,  # SXM
  r"NVIDIA H200": 989e12,  # SXM
  r"NVIDIA A100.*": 312e12,  # all forms
  r"NVIDIA L40S": 362e12,
  r"NVIDIA B200": 2250e12,
  r"TPU v4": CHIPS["v4"].bf16_flops,
  r"TPU v5( lite|e)": CHIPS["v5e"].bf16_flops,
  r"TPU v5p?": CHIPS["v5p"].bf16_flops,
  r"TPU v6( lite|e)": CHIPS["v6e"].bf16_flops,
}


def peak_flops(card: str) -> float | None:
  """FLOP/s of a card; None for one that is not in the table."""
  found = (
    peak for name, peak in _PEAKS.items() if re.fullmatch(name, card.strip())
  )
  return next(found, None)
