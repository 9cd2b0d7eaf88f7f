"""How much windows save, and how fast TMSA is beside PyTorch's forms.

  python -m benchmarks.attention [--torch_python=PATH] [--json=FILE]

Time-dependent attention, projections included, float32 at full precision,
forward alone and with the gradient of inputs and parameters. Each table's cases
and implementations take turns.
"""

import dataclasses
import functools
import pathlib
import tempfile

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import report, yardstick
from diffit_jax.models import attention
from diffit_jax.models.kernels import plain

_TURNS = flags.DEFINE_integer("turns", 7, "Measured turns, after one.", 1)
TABLE = "relative_position_bias_table"


@dataclasses.dataclass(frozen=True)
class Case:
  """TMSA on `batch` maps of side x side tokens."""

  side: int
  window: int
  width: int
  heads: int
  batch: int

  def arrays(self) -> dict[str, np.ndarray]:
    """Parameters, x and time, in PyTorch's names and layout."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    dense = lambda name, out, rows: {
      f"{name}.weight": normal(out, rows) / np.float32(rows**0.5),
      f"{name}.bias": normal(out) / 10,
    }
    c = self.width
    return {
      "x": normal(self.batch, self.side, self.side, c),
      "time": normal(self.batch, c),
      TABLE: normal((2 * self.window - 1) ** 2, self.heads),
      **dense("qkv", 3 * c, c),
      **dense("qkv_temb", 3 * c, c),
      **dense("proj", c, c),
    }

  def passes(self):
    """Our (forward, forward and gradient), jitted, and their arguments."""
    arrays = {k: jnp.asarray(v) for k, v in self.arrays().items()}
    x, time = arrays.pop("x"), arrays.pop("time")
    params = {TABLE: arrays.pop(TABLE)}
    for name in ("qkv", "qkv_temb", "proj"):
      params[name] = {
        "kernel": arrays[f"{name}.weight"].T,
        "bias": arrays[f"{name}.bias"],
      }
    module = attention.TMSA(self.heads, self.window)

    def forward(params, x, time):
      with jax.default_matmul_precision("highest"):
        return module.apply({"params": params}, x, time)

    loss = lambda *args: jnp.square(forward(*args)).sum()
    both = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(forward), jax.jit(both), (params, x, time)


def measure(case: Case, folder: pathlib.Path, call, turns: int) -> list[dict]:
  """Rows of one case: forward, and with the gradient."""
  forward, both, args = case.passes()
  if call:
    save_file(case.arrays(), folder / "in")
    sizes = dict(side=case.side, window=case.window, num_heads=case.heads)
    call("load_attention", path=str(folder / "in"), width=case.width, **sizes)
    for name in yardstick.ATTENTIONS:
      out = str(folder / "out")
      call("run_attention", attention=name, backward=False, output=out)
      its = load_file(out)["out"]
      yardstick.check_equal(forward(*args), its, f"TMSA ({name})")
  rows = []
  for what, run in (("forward", forward), ("with gradient", both)):
    alternatives = {"ours": functools.partial(report.seconds, run, *args)}
    for name in yardstick.ATTENTIONS if call else ():
      backward = what != "forward"
      alternatives[name] = functools.partial(
        call, "run_attention", attention=name, backward=backward
      )
    times = report.in_turns(alternatives, turns)
    rows.append(row(case, what, report.medians(times)))
  return rows


def row(case: Case, what: str, times: dict[str, float]) -> dict:
  best = min((t for n, t in times.items() if n != "ours"), default=None)
  tokens = case.batch * case.side**2
  return {
    "tokens": f"{case.batch} x {case.side}x{case.side}",
    "width": case.width,
    "heads": case.heads,
    "window": case.window if case.window < case.side else "global",
    "pass": what,
    "ours ms": 1e3 * times["ours"],
    "ours ns/token": 1e9 * times["ours"] / tokens,
    **{
      f"torch {name} ms": 1e3 * times[name] if best else None
      for name in yardstick.ATTENTIONS
    },
    "ours / faster torch": times["ours"] / best if best else None,
  }


def windows(folder, call, turns: int) -> report.Table:
  """Windowed beside global attention at the size of FFHQ-64's first level."""
  wide = dict(width=128, heads=2)
  cases = [Case(64, 64, batch=1, **wide)]
  cases += [Case(side, 8, batch=1, **wide) for side in (64, 32, 16)]
  rows = [r for case in cases for r in measure(case, folder, call, turns)]
  notes = []
  for whole, windowed in zip(rows[:2], rows[2:4]):
    ratio = whole["ours ms"] / windowed["ours ms"]
    notes.append(
      f"64x64 tokens of 128, {whole['pass']}: windows of 8 are {ratio:.1f}"
      " times as fast as global attention."
    )
  return report.Table("Windowed and global attention", rows, notes)


def widths(folder, call, turns: int) -> report.Table:
  """Global attention over 64 to 1024 tokens, as the latent models have it."""
  cases = [Case(s, s, 1152, 16, batch=1024 // s**2) for s in (8, 16, 32)]
  rows = [r for case in cases for r in measure(case, folder, call, turns)]
  return report.Table("Global attention, 1024 tokens in all", rows)


def spread_bias(turns: int) -> report.Table:
  """The bias alone, in the two ways that `plain` has, and by a gather."""

  def by_axes(spread):
    def run(table, side):
      axes = table.T.reshape(-1, 2 * side - 1, 2 * side - 1)
      return spread(axes, side).reshape(-1, side**2, side**2)

    return run

  def gather(table, side):
    row, col = np.divmod(np.arange(side**2), side)
    index = (row[:, None] - row + side - 1) * (2 * side - 1)
    index += col[:, None] - col + side - 1
    return jnp.moveaxis(table[index], -1, 0)

  rows = []
  for side in (8, 16, 32):
    table = jnp.ones(((2 * side - 1) ** 2, 16))
    g = jnp.ones((16, side**2, side**2))
    alternatives = {}
    for name, spread in (
      ("reshapes", by_axes(plain.spread_by_reshapes)),
      ("products", by_axes(plain.spread_by_products)),
      ("gather", gather),
    ):
      run = jax.jit(lambda table, f=spread, s=side: f(table, s))
      back = jax.jit(lambda table, g, f=run: jax.vjp(f, table)[1](g))
      alternatives[f"{name} ms"] = functools.partial(report.seconds, run, table)
      alternatives[f"{name}, gradient ms"] = functools.partial(
        report.seconds, back, table, g
      )
    times = report.medians(report.in_turns(alternatives, turns))
    rows.append({"side": side, "heads": 16})
    rows[-1] |= {name: 1e3 * value for name, value in times.items()}
  return report.Table("The position bias of one layer", rows)


def main(_) -> None:
  turns = 5 if report.SHORT.value else _TURNS.value
  with (
    yardstick.start() as (about, call),
    tempfile.TemporaryDirectory() as name,
  ):
    folder = pathlib.Path(name)
    tables = [windows(folder, call, turns), widths(folder, call, turns)]
    tables.append(spread_bias(turns))
  rate = f"Products of float32 matrices: {report.matmul_rate():.0f} GFLOP/s."
  report.emit(tables, [about, rate])


if __name__ == "__main__":
  app.run(main)
