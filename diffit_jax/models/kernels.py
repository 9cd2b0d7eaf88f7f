"""Ways to compute attention, equation (6), one row of KERNELS each.

Plain XLA serves everything, and is what `training.attention_probe` compares the
fused kernels with before one is used. A further kernel is a row here.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffit_jax.errors import UserError
from diffit_jax.models.compute import PLAIN


class AttentionShape(NamedTuple):
  """One kind of attention in a network, as far as a kernel needs to know.

  Attributes:
    tokens: number that attend to each other.
    heads: number of heads.
    width: width of one head.
    bias: "shared" by all samples, "each" has one, or "none".
  """

  tokens: int
  heads: int
  width: int
  bias: str


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute attention, and what it serves.

  Attributes:
    attend: (q, k, v, bias) -> output, as `attend`.
    dtype: the only model.dtype that it computes in; "" for all.
    platform: the only platform of JAX that it runs on; "" for all.
    device: name of that platform's devices in a message.
    refusal: AttentionShape -> what the kernel wants and what it would get, "{}"
      standing for the option that decides; "" where it serves the shape.
  """

  attend: Callable[..., jax.Array]
  dtype: str = ""
  platform: str = ""
  device: str = ""
  refusal: Callable[[AttentionShape], str] = lambda shape: ""


def serves(name: str, shapes: Sequence[AttentionShape]) -> bool:
  """Whether there is a kernel that computes all of a network's attention."""
  return name in KERNELS and not any(map(KERNELS[name].refusal, shapes))


def check_shapes(
  name: str, shapes: Sequence[AttentionShape], option: str
) -> None:
  """Refuses an unknown kernel, or one that does not serve a network.

  Args:
    name: model.attention.
    shapes: shapes of the network's attention.
    option: what decides over the network's bias, as "model.time_in='plain'".
  """
  if name not in KERNELS:
    allowed = tuple(n for n in KERNELS if serves(n, shapes))
    raise UserError(f"model.attention={name!r}: use one of {allowed}")
  for refusal in filter(None, map(KERNELS[name].refusal, shapes)):
    raise UserError(
      f"model.attention={name!r} {refusal.format(option)}: use"
      f" model.attention={PLAIN!r}"
    )


def check_machine(name: str, platform: str, dtype: str) -> None:
  """Refuses a kernel where it cannot run at all.

  Args:
    name: model.attention.
    platform: platform of the devices, as JAX calls it.
    dtype: model.dtype.
  """
  kernel = KERNELS.get(name, KERNELS[PLAIN])
  if kernel.platform not in ("", platform):
    raise UserError(
      f"model.attention={name!r} needs {kernel.device}, not a {platform}: use"
      f" model.attention={PLAIN}"
    )
  if kernel.dtype not in ("", dtype):
    raise UserError(
      f"model.attention={name!r} computes in {kernel.dtype}: set"
      f" model.dtype={kernel.dtype}, or model.attention={PLAIN}"
    )


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  bias: jax.Array | None,
  kernel: str = PLAIN,
) -> jax.Array:
  """Equation (6): softmax(q k^T / sqrt(d) + B) v, softmax in float32.

  Args:
    q: [*b, heads, n, d] queries; k and v likewise.
    k: keys.
    v: values.
    bias: [heads, n, n], anything that broadcasts to [*b, heads, n, n], or None
      for B = 0.
    kernel: a key of KERNELS. A fused kernel may round the bias to q's dtype.

  Returns:
    [*b, heads, n, d] of v's dtype.
  """
  return KERNELS[kernel].attend(q, k, v, bias)


def _attend_xla(q, k, v, bias):
  weights = attention_weights(q, k, bias, v.dtype)
  return jnp.einsum("...nm,...md->...nd", weights, v)


def attention_weights(
  q: jax.Array,
  k: jax.Array,
  bias: jax.Array | None,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """The softmax of (6): [*b, heads, n, n], axes (query, key).

  Computed in float32 (or wider, as q is), and rounded to dtype if given.
  """
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum(
    "...nd,...md->...nm",
    q * jnp.asarray(scale, q.dtype),
    k,
    preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
  )
  logits = logits if bias is None else _add_bias(logits, bias)
  return softmax(logits, dtype or logits.dtype)


@jax.custom_jvp
def _add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
  return logits + bias


@_add_bias.defjvp
def _add_bias_jvp(primals, tangents):
  logits, bias = primals
  d_logits, d_bias = tangents
  lead = logits.shape[: logits.ndim - bias.ndim]
  return logits + bias, d_logits + _repeat(d_bias, lead)


def _repeat(bias: jax.Array, lead: tuple[int, ...]) -> jax.Array:
  """[*shape] -> [*lead, *shape], whose gradient sums fast on CPU, too.

  XLA for CPU sums over leading axes 25 times slower than it contracts them
  (jax 0.10.2; 4 x 16 x 256 x 256), so there the sum is a product with ones.
  """

  def times_ones(bias):
    ones, no_axes = jnp.ones(lead, bias.dtype), ((), ())
    dimensions = no_axes, no_axes
    return jax.lax.dot_general(ones, bias, dimensions, precision="highest")

  return jax.lax.platform_dependent(
    bias,
    cpu=times_ones,
    default=lambda bias: jnp.broadcast_to(bias, (*lead, *bias.shape)),
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def softmax(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Over the last axis, rounded to dtype.

  It keeps its result for the backward pass, no more; `jax.nn.softmax` by itself
  keeps the exponentials, and both in float32.
  """
  return jax.nn.softmax(x, axis=-1).astype(dtype)


@softmax.defjvp
def _softmax_jvp(dtype, primals, tangents):
  y = softmax(*primals, dtype)

  def tangent(y, dx):
    y = y.astype(dx.dtype)
    return (y * (dx - jnp.sum(y * dx, axis=-1, keepdims=True))).astype(dtype)

  # Without the checkpoint, the wide copy of y is what would be kept.
  return y, jax.checkpoint(tangent, prevent_cse=False)(y, *tangents)


def _attend_cudnn(q, k, v, bias):
  """The same through cuDNN, whose gradient of the bias wants a batch of 1."""
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


def _refusal_of_cudnn(shape: AttentionShape) -> str:
  if shape.bias == "shared":
    return ""
  found = "one each" if shape.bias == "each" else "none"
  return f"wants one bias for all samples, and {{}} has {found}"


KERNELS = {
  PLAIN: Kernel(_attend_xla),
  "cudnn": Kernel(
    _attend_cudnn,
    dtype="bfloat16",
    platform="gpu",
    device="an NVIDIA GPU",
    refusal=_refusal_of_cudnn,
  ),
}
