"""Attention through cuDNN's fused kernels, on NVIDIA GPUs in bfloat16."""

import jax

from diffit_jax.models.kernels.plain import AttentionShape, by_heads


@by_heads
def attend(q, k, v, bias):
  """`Kernel.attend`; the bias gets a batch of 1, which its gradient wants."""
  heads, n, d = q.shape[-3:]
  flat = lambda x: x.reshape(-1, heads, n, d).swapaxes(1, 2)
  out = jax.nn.dot_product_attention(
    flat(q),
    flat(k),
    flat(v),
    bias=None if bias is None else bias[None].astype(q.dtype),
    scale=d**-0.5,
    implementation="cudnn",
  )
  return out.swapaxes(1, 2).reshape(q.shape)


def refusal(shape: AttentionShape) -> str:
  """What it wants that an attention does not have; "" where it serves it."""
  if shape.bias == "shared":
    return ""
  found = "one each" if shape.bias == "each" else "none"
  return f"wants one bias for all samples, and {{}} has {found}"
