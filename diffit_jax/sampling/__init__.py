"""From noise to samples: `sample`, one file per solver, one loop.

JAX is imported where a solver is made and not before, so that the commands can
read the table for their --help.
"""

import importlib
import inspect
import numbers
from typing import TYPE_CHECKING

from diffit_jax.errors import UserError

if TYPE_CHECKING:
  import jax

  from diffit_jax.sampling.scan import Denoiser, Levels, Skip, Solver

# {solver: the processes that it samples}: EDM's falling noise levels, ADM's
# discrete steps, or the shares of noise of flow matching. Each solver is a
# module here with a function `make_solver`, which is told the process if there
# are several.
SOLVERS = {
  "edm_heun": ("edm",),
  "ddpm": ("adm",),
  "ddim": ("adm",),
  "dpmpp_2m": ("adm", "flow"),
  "unipc": ("adm", "flow"),
  "euler": ("flow",),
  "heun": ("flow",),
  "euler_maruyama": ("flow",),
}
# For solvers of several processes: the module here that has its `levels`.
_LEVELS = {"adm": "discrete", "flow": "continuous"}


def by_process() -> str:
  """ "a for edm; b, c or d for adm": the solvers in words."""
  texts = []
  for process in dict.fromkeys(p for own in SOLVERS.values() for p in own):
    *most, last = [name for name, own in SOLVERS.items() if process in own]
    names = f"{', '.join(most)} or {last}" if most else last
    texts.append(f"{names} for {process}")
  return "; ".join(texts)


def process_options(solver: str, process: str) -> dict:
  """What `make_solver` is told, beside the user's options, of the process."""
  return {"process": process} if len(SOLVERS.get(solver, ())) > 1 else {}


def sample(
  denoiser: "Denoiser",
  solver: str,
  noise: "jax.Array",
  *,
  steps: int,
  keys: "jax.Array | None" = None,
  step_noise: "jax.Array | None" = None,
  plain: "Denoiser | None" = None,
  skip: "Skip | None" = None,
  **solver_options,
) -> "jax.Array":
  """Turns noise into samples.

  Everything but `solver`, `steps` and the options may be traced: call it under
  `jax.jit`, with a denoiser that closes over the jitted function's params.

  Args:
    denoiser: guidance already applied; for the solvers of "edm"
      (x [b, h, w, c], sigma [b]) -> D [b, h, w, c], the expected clean images;
      for those of "adm" (x [b, h, w, c], t [b]) -> [b, h, w, 2c] eps and v, or
      [b, h, w, c] eps alone. t is the original step 0..999, int32; a float in
      the dtype of `noise` if spacing="logsnr_exact". For those of "flow", and
      others with process="flow", (x [b, h, w, c], t [b]) -> D [b, h, w, c] with
      t the share of noise.
    solver: one of `SOLVERS`.
    noise: [b, h, w, c] unit normal; its dtype, float32 or float64, is that of
      the computation.
    steps: steps of the solver, > 0.
    keys: [b] typed PRNG keys, one per sample, needed where the solver draws
      noise. Draw k of a sample is normal(fold_in(its key, k)), so it depends on
      nothing else in the batch. Take `noise` from another stream.
    step_noise: [draws, b, h, w, c] to use in place of the keys, in call order:
      `steps` draws for "edm_heun" with churn, "ddpm", "ddim" with eta > 0 and
      "euler_maruyama", of which the last is multiplied by 0 in all but the
      first.
      Deterministic runs read neither.
    plain: the denoiser without guidance, for where `skip` says so.
    skip: noise levels [n] of the evaluations, on the host -> bool [n],
      such as `Guidance.skippable`; see `Solver.num_skipped`.
    **solver_options: keyword arguments of the solver's `make_solver`.

  Returns:
    [b, h, w, c] samples in the dtype of `noise`.
  """
  from diffit_jax.sampling import scan

  return scan.run(
    denoiser,
    make_solver(solver, steps, **solver_options),
    noise,
    keys=keys,
    step_noise=step_noise,
    plain=plain,
    skip=skip,
  )


def make_solver(name: str, steps: int, **options) -> "Solver":
  """A solver of the table.

  Args:
    name: one of `SOLVERS`.
    steps: steps of the solver, > 0.
    **options: further arguments of its module's `make_solver`.

  Raises:
    UserError: an unknown solver or option, or steps that cannot be had.
  """
  if name not in SOLVERS:
    raise UserError(
      f"solver {name!r} is unknown; allowed: {', '.join(SOLVERS)}"
    )
  if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
    raise UserError(f"{steps=} must be a whole number above 0")
  make = importlib.import_module(f"{__name__}.{name}").make_solver
  allowed = _options(make)
  if "process" in allowed:
    process = options.get("process", SOLVERS[name][0])
    if process not in SOLVERS[name]:
      raise UserError(
        f"solver {name!r} does not sample {process=}; allowed:"
        f" {', '.join(SOLVERS[name])}"
      )
    allowed |= _options(_levels_of(process))
  for option, value in options.items():
    if option not in allowed:
      named = ", ".join(each for each in allowed if each != "process")
      raise UserError(
        f"solver {name!r} has no option {option!r}; allowed: {named}"
      )
    if not _is_like(value, allowed[option]):
      kind = {bool: "True or False", int: "a whole number", str: "a name"}.get(
        type(allowed[option]), "a number"
      )
      raise UserError(f"solver {name!r}: {option}={value!r} must be {kind}")
  return make(steps, **options)


def _is_like(value, default) -> bool:
  """Whether an option's value is of the kind of its default."""
  if isinstance(default, float) and not isinstance(value, bool):
    return isinstance(value, numbers.Real)
  return type(value) is type(default)


def levels(process: str, steps: int, **options) -> "Levels":
  """The levels of n steps of a process that several solvers sample.

  Args:
    process: "adm" or "flow".
    steps: n.
    **options: of its own `levels`.
  """
  return _levels_of(process)(steps, **options)


def _levels_of(process: str):
  return importlib.import_module(f"{__name__}.{_LEVELS[process]}").levels


def _options(make) -> dict:
  """{option: its default} of a function (steps, *, ...)."""
  parameters = [*inspect.signature(make).parameters.values()][1:]
  return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
