"""Whether a fused attention kernel may be trusted with DiffiT's learned bias.

Fused kernels have given wrong or missing gradients of a learned bias, without
an error, so one is only used after its output and its gradients, that of the
bias first, were compared with plain XLA's on the machine that will train.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models import attention

NAMES = ("output", "d(bias)", "d(q)", "d(k)", "d(v)")
# Error in units of bfloat16 XLA's own error: rounding in another order. XLA may
# keep more digits than bfloat16 has, so that its error is at least ROUNDING.
TOLERANCE = 4.0
ROUNDING = 2.0**-9


def check_config(config: config_dict.ConfigDict, platform: str) -> None:
  """Refuses cuDNN attention where it cannot run at all."""
  if config.model.get("attention", "xla") != "cudnn":
    return
  models.make_model(config.model)  # refuses a model that has none
  if platform != "gpu":
    raise UserError(
      f"model.attention={config.model.attention!r} needs an NVIDIA GPU, not a"
      f" {platform}: use model.attention=xla"
    )
  if config.model.dtype != "bfloat16":
    raise UserError(
      "model.attention='cudnn' computes in bfloat16: set"
      " model.dtype=bfloat16, or model.attention=xla"
    )


def probe_config(config: config_dict.ConfigDict) -> None:
  """Runs the probe with the config's head and window sizes, where it asks."""
  if config.model.get("attention", "xla") != "cudnn":
    return
  model = models.make_model(config.model)
  for sizes in model.attention_sizes(config.data.resolution):
    probe(*sizes)


def probe(
  num_heads: int, head_dim: int, side: int, attend: Callable | None = None
) -> None:
  """Compares a fused kernel with XLA on random bfloat16 tokens.

  Args:
    num_heads: of the model's attention.
    head_dim: width of one head.
    side: of the square of tokens that attend to each other.
    attend: (q, k, v, bias) -> output; None is cuDNN's.

  Raises:
    UserError: it fails to run, or its output or a gradient is off.
  """
  if attend is None:
    attend = lambda *args: attention.attend(*args, attention="cudnn")
  n = side**2
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
  # Batches of 3 windows: a kernel that forgets to sum d(bias) over them shows.
  q, k, v, weight = (draw(3, num_heads, n, head_dim) for _ in range(4))
  bias = draw(num_heads, n, n).astype(jnp.float32)
  args = (q, k, v, bias)
  exact = tuple(x.astype(jnp.float32) for x in args)
  with jax.default_matmul_precision("highest"):
    expected = _outputs(attention.attend, exact, weight)
  plain = _outputs(attention.attend, args, weight)
  try:
    found = _outputs(attend, args, weight)
  except Exception as error:  # whatever the kernel's library raises
    raise UserError(
      f"model.attention='cudnn' does not run here ({_first_line(error)}): use"
      " model.attention=xla"
    ) from error
  for name, a, b, c in zip(NAMES, found, plain, expected):
    error, usual = _distance(a, c), max(_distance(b, c), ROUNDING)
    if not error <= TOLERANCE * usual:
      raise UserError(
        f"model.attention='cudnn' gives a wrong {name} here: relative error"
        f" {error:.1e}, plain XLA in bfloat16 {usual:.1e}: use"
        " model.attention=xla"
      )


def _outputs(attend: Callable, args: tuple, weight) -> tuple:
  """(output, d(bias), dq, dk, dv) of sum(weight * output)."""

  def total(q, k, v, bias):
    out = attend(q, k, v, bias)
    return jnp.sum((weight * out).astype(jnp.float32)), out

  run = jax.jit(jax.grad(total, argnums=(3, 0, 1, 2), has_aux=True))
  gradients, out = run(*args)
  return tuple(np.asarray(x, np.float64) for x in (out, *gradients))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
