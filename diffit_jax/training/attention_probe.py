"""Whether a fused attention kernel may be trusted with DiffiT's learned bias.

Fused kernels have given wrong or missing gradients of a learned bias, without
an error, so one is only used after its output and its gradients, that of the
bias first, were compared with plain XLA's on the machine that will train.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.kernels import PLAIN, AttentionShape

# Error in units of bfloat16 XLA's own error: rounding in another order. XLA may
# keep more digits than bfloat16 has, so that its error is at least ROUNDING.
TOLERANCE = 4.0
ROUNDING = 2.0**-9


def probe_config(config: config_dict.ConfigDict) -> None:
  """Runs the probe with the config's attention, where it asks for a kernel."""
  kernel = config.model.get("attention", PLAIN)
  if kernel == PLAIN:
    return
  model = models.make_model(config.model)
  for shape in dict.fromkeys(model.attention_shapes(config.data.resolution)):
    probe(kernel, shape)


def probe(kernel: str, shape: AttentionShape) -> None:
  """Compares a kernel with plain XLA on random bfloat16 tokens.

  Args:
    kernel: a key of `kernels.KERNELS`.
    shape: shape of the attention to be computed.

  Raises:
    UserError: it fails to run, or its output or a gradient is off.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  # Batches of 3 windows: a kernel that forgets to sum d(bias) over them shows.
  qkv = 3, shape.heads, shape.tokens, shape.width
  q, k, v, weight = (draw(*qkv) for _ in range(4))
  tokens = {"q": q, "k": k, "v": v}
  if shape.bias != "none":
    lead = (3,) if shape.bias == "each" else ()
    bias = draw(*lead, shape.heads, shape.tokens, shape.tokens)
    tokens = {"bias": bias.astype(jnp.float32), **tokens}
  exact = {name: x.astype(jnp.float32) for name, x in tokens.items()}
  with jax.default_matmul_precision("highest"):
    expected = _outputs(PLAIN, exact, weight)
  plain = _outputs(PLAIN, tokens, weight)
  try:
    found = _outputs(kernel, tokens, weight)
  except Exception as error:  # whatever the kernel's library raises
    raise UserError(
      f"model.attention={kernel!r} does not run here ({_first_line(error)}):"
      f" use model.attention={PLAIN}"
    ) from error
  for name in expected:
    error = _distance(found[name], expected[name])
    usual = max(_distance(plain[name], expected[name]), ROUNDING)
    if not error <= TOLERANCE * usual:
      raise UserError(
        f"model.attention={kernel!r} gives a wrong {name} here: relative error"
        f" {error:.1e}, plain XLA in bfloat16 {usual:.1e}: use"
        f" model.attention={PLAIN}"
      )


def _outputs(
  kernel: str, tokens: Mapping[str, jax.Array], weight: jax.Array
) -> dict[str, np.ndarray]:
  """The output, and the gradients "d(bias)" and so on of sum(weight * it)."""

  def total(tokens):
    out = kernels.attend(**{"bias": None, **tokens}, kernel=kernel)
    return jnp.sum((weight * out).astype(jnp.float32)), out

  gradients, out = jax.jit(jax.grad(total, has_aux=True))(tokens)
  outputs = {"output": out}
  outputs |= {f"d({name})": gradients[name] for name in tokens}
  return {name: np.asarray(x, np.float64) for name, x in outputs.items()}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
