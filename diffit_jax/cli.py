"""What every entry point shares: flag parsing, error lines and exit codes.

Exit code 0 means done, 75 (EX_TEMPFAIL) means "saved, start me again", and
anything else means not done, with one clear last line on stderr.
"""

from collections.abc import Callable
import dataclasses
import logging as stdlib_logging
import os
import sys

from absl import app, flags, logging

from diffit_jax.errors import UserError

REQUEUE = 75


def run(
    main: Callable[..., int | None], positional: str | None = None
) -> None:
  """Parses the flags, calls `main` and exits as the module docstring says.

  Args:
    main: takes nothing (flags are read from `flags.FLAGS`), or the argument
      that `positional` names, and returns an exit code, None standing for 0.
    positional: what the one argument without a flag is called, if there is one.
  """
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold("info")
  logging.get_absl_handler().addFilter(_is_ours_or_a_warning)
  app.run(
      lambda argv: _guard(main, argv, positional), flags_parser=_parse_flags
  )


def _is_ours_or_a_warning(record) -> bool:
  """Hides the progress notes of libraries (Orbax writes 40 lines a save)."""
  ours = os.path.dirname(__file__)
  return (
      record.levelno >= stdlib_logging.WARNING
      or record.pathname.startswith(ours)
      or f"{os.sep}clu{os.sep}" in record.pathname
  )


def _guard(
    main: Callable[..., int | None], argv: list[str], positional: str | None
) -> int:
  arguments, num_wanted = argv[1:], 1 if positional else 0
  try:
    if len(arguments) < num_wanted:
      raise UserError(f"{positional} is missing (--help says what it may be)")
    if len(arguments) > num_wanted:
      raise UserError(
          f"unexpected argument {arguments[num_wanted]!r}: options are written"
          " --name=value"
      )
    return main(*arguments) or 0
  except UserError as error:
    return fail(error)
  except KeyboardInterrupt:
    return fail("interrupted; run the same command again to continue", 130)
  except BrokenPipeError:  # stdout was closed early, as by `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def fail(error: object, code: int = 1) -> int:
  """Prints `error` as one last line on stderr; returns the exit code."""
  logging.flush()
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
  return code


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except (UserError, flags.Error) as error:
    sys.exit(fail(f"{error} (--help lists the flags)"))
  # ml_collections reports a field that a config lacks in these ways.
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    sys.exit(fail(error.args[0] if error.args else error))
  except FileNotFoundError as error:
    sys.exit(fail(f"config file not found: {error.filename}"))


def required_config(config):
  """The config, or an error that says how to give one."""
  if config is None:
    raise UserError("--config is missing: give --config=configs/digits.py")
  return config


def require_one_of(**values: str | None) -> None:
  """Refuses unless exactly one of the named flags was given."""
  if sum(value is not None for value in values.values()) != 1:
    names = " or ".join(f"--{name}=..." for name in values)
    raise UserError(f"give {'exactly one of ' * (len(values) > 1)}{names}")


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
  """The sampling flags that all entry points share."""

  solver: flags.FlagHolder
  steps: flags.FlagHolder
  guidance_scale: flags.FlagHolder
  labels: flags.FlagHolder
  seed: flags.FlagHolder
  num: flags.FlagHolder
  ema: flags.FlagHolder

  def apply(self, sampler) -> None:
    """Writes the flags that were given over the config's sampler section."""
    for name in ("solver", "steps", "guidance_scale"):
      value = getattr(self, name).value
      if value is not None:
        sampler[name] = value


def define_sampling_flags() -> SamplingFlags:
  """Defines --solver --steps --guidance_scale --labels --seed --num --ema."""
  return SamplingFlags(
      solver=flags.DEFINE_string("solver", None, "Default: the config's."),
      steps=flags.DEFINE_integer("steps", None, "Default: the config's."),
      guidance_scale=flags.DEFINE_float(
          "guidance_scale", None, "1 is off. Default: the config's."
      ),
      labels=flags.DEFINE_string(
          "labels",
          "random",
          "Classes such as 3, 0,1,2 or 0-9, dealt out in turn, or random.",
      ),
      seed=flags.DEFINE_integer("seed", 0, "Of all random draws.", 0),
      num=flags.DEFINE_integer("num", 64, "Number of images.", 1),
      ema=flags.DEFINE_string(
          "ema",
          None,
          "Which average of the weights; none for the raw parameters. Default:"
          " the run's first.",
      ),
  )
