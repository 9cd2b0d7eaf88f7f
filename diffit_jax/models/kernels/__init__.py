"""Ways to compute attention, equation (6), one row of KERNELS each.

Plain XLA serves everything, and is what `probe` compares the fused kernels with
before one is used. A further kernel is a row here.
"""

from collections.abc import Callable, Sequence
import dataclasses
import importlib

import jax

from diffit_jax.errors import UserError
from diffit_jax.models.compute import AUTO, PLAIN, Compute
from diffit_jax.models.kernels import plain
from diffit_jax.models.kernels.plain import AttentionShape, by_heads


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute attention, and what it serves.

  Attributes:
    attend: (qkv, table, num_heads, window) -> output, as `attend`.
    dtype: the only model.dtype that it computes in; "" for all.
    platform: the only platform of JAX that it runs on; "" for all.
    device: name of that platform's devices in a message.
    too_small: kinds of that device that it does not run on, as JAX calls them.
    refusal: AttentionShape -> what the kernel wants and what it would get, "{}"
      standing for the option that decides; "" where it serves the shape.
    is_local: whether each device computes its part of the batch by itself, and
      the gradient of a shared table is summed over devices, not that of B.
      Otherwise the compiler splits the work.
  """

  attend: Callable[..., jax.Array]
  dtype: str = ""
  platform: str = ""
  device: str = ""
  too_small: tuple[str, ...] = ()
  refusal: Callable[[AttentionShape], str] = lambda shape: ""
  is_local: bool = False


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
  if name == AUTO:
    return
  if name not in KERNELS:
    allowed = (*(n for n in KERNELS if serves(n, shapes)), AUTO)
    raise UserError(f"model.attention={name!r}: use one of {allowed}")
  for refusal in filter(None, map(KERNELS[name].refusal, shapes)):
    raise UserError(
      f"model.attention={name!r} {refusal.format(option)}: use"
      f" model.attention={PLAIN!r}"
    )


def runs_on(name: str, platform: str, kind: str, dtype: str) -> bool:
  """Whether a kernel can run at all; arguments as in `check_machine`."""
  try:
    check_machine(name, platform, kind, dtype)
  except UserError:
    return False
  return True


def check_machine(name: str, platform: str, kind: str, dtype: str) -> None:
  """Refuses a kernel where it cannot run at all.

  Args:
    name: model.attention.
    platform: platform of the devices, as JAX calls it.
    kind: kind of the devices, as JAX calls it.
    dtype: model.dtype.
  """
  kernel = KERNELS.get(name, KERNELS[PLAIN])
  if kernel.platform not in ("", platform) or kind in kernel.too_small:
    newer = f" newer than {kernel.too_small[-1]}" if kernel.too_small else ""
    raise UserError(
      f"model.attention={name!r} needs {kernel.device}{newer}, not {kind}: use"
      f" model.attention={PLAIN}"
    )
  if kernel.dtype not in ("", dtype):
    raise UserError(
      f"model.attention={name!r} computes in {kernel.dtype}: set"
      f" model.dtype={kernel.dtype}, or model.attention={PLAIN}"
    )


def choose(
  shapes: Sequence[AttentionShape], platform: str, kind: str, dtype: str
) -> str:
  """What `auto` stands for: the fused kernel that serves all, or plain XLA.

  Args:
    shapes: shapes of the network's attention.
    platform: platform of the devices, as JAX calls it.
    kind: kind of the devices, as JAX calls it.
    dtype: model.dtype.
  """
  machine = platform, kind, dtype
  for name, kernel in KERNELS.items():
    is_fused = kernel.platform == platform
    if is_fused and runs_on(name, *machine) and serves(name, shapes):
      return name
  return PLAIN


def attend(
  qkv: jax.Array,
  table: jax.Array | None,
  num_heads: int,
  window: int,
  compute: Compute = Compute(),
) -> jax.Array:
  """Equation (6): softmax(q k^T / sqrt(d) + B) v in each window.

  Args:
    qkv: [b, h, w, 3c] queries, keys and values, side by side; each has axes
      (head, d) in c.
    table: [(2 window - 1)^2, heads] relative offsets, as
      `plain.relative_position_bias` spreads them over B; [b, ...] of one for
      each sample; None for B = 0.
    num_heads: number of heads.
    window: side of the windows, which divides h and w.
    compute: names the kernel. A fused one may round B to qkv's dtype.

  Returns:
    [b, h, w, c], the merged heads, of qkv's dtype.
  """
  kernel = KERNELS[compute.attention]
  run = lambda qkv, table: kernel.attend(qkv, table, num_heads, window)
  if kernel.is_local and table is not None and table.ndim == 2:
    run = compute.per_device(run)
  return run(qkv, table)


def _functions(file: str) -> dict[str, Callable]:
  """`attend` and `refusal` of a file that is imported when one is called."""

  def load(name):
    module = lambda: importlib.import_module(f"{__name__}.{file}")
    return lambda *args: getattr(module(), name)(*args)

  return {name: load(name) for name in ("attend", "refusal")}


KERNELS = {
  PLAIN: Kernel(by_heads(plain.attend), is_local=True),
  "pallas": Kernel(
    **_functions("tpu"),
    dtype="bfloat16",
    platform="tpu",
    device="a TPU",
    too_small=("TPU v2", "TPU v3", "TPU v4"),  # 16 MiB of memory on a core
    is_local=True,
  ),
  "cudnn": Kernel(
    **_functions("cudnn"),
    dtype="bfloat16",
    platform="gpu",
    device="an NVIDIA GPU",
  ),
}
