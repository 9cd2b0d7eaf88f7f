"""Whether a fused attention kernel may be trusted with DiffiT's learned bias.

Fused kernels have given wrong or missing gradients of a learned bias, without
an error, so one is only used after its output and its gradients, that of the
bias first, were compared with plain XLA's on the machine that will train.
"""

from collections.abc import Iterable
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.compute import PLAIN, Compute
from diffit_jax.models.kernels.plain import AttentionShape

# Error in units of plain XLA's own error in the same dtype: rounding in another
# order. XLA may keep more digits than the dtype has, so that its error is at
# least half a unit in the last place.
TOLERANCE = 4.0


def probe_all(
  kernel: str,
  shapes: Iterable[AttentionShape],
  batch_size: int = 4,
  dtype: str = "bfloat16",
) -> None:
  """Probes a kernel with all of a network's attention; see `probe`."""
  for shape in dict.fromkeys(shapes) if kernel != PLAIN else ():
    probe(kernel, shape, batch_size, dtype)


def probe(
  kernel: str,
  shape: AttentionShape,
  batch_size: int = 4,
  dtype: str = "bfloat16",
) -> None:
  """Compares a kernel with plain XLA on random tokens.

  Args:
    kernel: a key of `kernels.KERNELS`.
    shape: shape of the attention to be computed.
    batch_size: number of images that a device has; the probe takes 3 or 4 of
      them, odd or even as that is.
    dtype: type of the tokens.

  Raises:
    UserError: it fails to run, or its output or a gradient is off.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  # More than one image: a kernel that forgets to sum d(bias) over them shows.
  side, num = math.isqrt(shape.tokens), 4 - batch_size % 2
  c = shape.heads * shape.width
  tokens = {"qkv": draw(num, side, side, 3 * c)}
  weight = draw(num, side, side, c)
  if shape.bias != "none":
    lead = (num,) if shape.bias == "each" else ()
    table = draw(*lead, (2 * side - 1) ** 2, shape.heads)
    tokens["table"] = table.astype(jnp.float32)
  exact = {name: x.astype(jnp.float32) for name, x in tokens.items()}
  with jax.default_matmul_precision("highest"):
    expected = _outputs(PLAIN, shape, exact, weight)
  usual = _outputs(PLAIN, shape, tokens, weight)
  try:
    found = _outputs(kernel, shape, tokens, weight)
  except Exception as error:  # whatever the kernel's library raises
    raise UserError(
      f"model.attention={kernel!r} does not run here ({_first_line(error)}):"
      f" use model.attention={PLAIN}"
    ) from error
  least = float(jnp.finfo(dtype).eps) / 4
  for name in expected:
    error = _distance(found[name], expected[name])
    own = max(_distance(usual[name], expected[name]), least)
    if not error <= TOLERANCE * own:
      raise UserError(
        f"model.attention={kernel!r} gives a wrong {name} here: relative error"
        f" {error:.1e}, plain XLA in {dtype} {own:.1e}: use"
        f" model.attention={PLAIN}"
      )


def _outputs(
  kernel: str,
  shape: AttentionShape,
  tokens: dict[str, jax.Array],
  weight: jax.Array,
) -> dict[str, np.ndarray]:
  """The output, and the gradients "d(table)" and so on of sum(weight * it)."""
  compute = Compute(attention=kernel)

  def total(tokens):
    table, side = tokens.get("table"), weight.shape[1]
    out = kernels.attend(tokens["qkv"], table, shape.heads, side, compute)
    return jnp.sum((weight * out).astype(jnp.float32)), out

  gradients, out = jax.jit(jax.grad(total, has_aux=True))(tokens)
  parts = np.split(np.asarray(gradients["qkv"], np.float64), 3, axis=-1)
  outputs = {"output": out, **dict(zip(("d(q)", "d(k)", "d(v)"), parts))}
  if "table" in tokens:
    outputs["d(bias)"] = gradients["table"]
  return {name: np.asarray(x, np.float64) for name, x in outputs.items()}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
