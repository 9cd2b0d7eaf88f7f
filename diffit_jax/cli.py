"""What every entry point shares: flag parsing, error lines and exit codes.

Exit code 0 means done, 75 (EX_TEMPFAIL) means "saved, start me again", and
anything else means not done, with one clear last line on stderr.
"""

import os
import sys
from typing import Callable

from absl import app, flags, logging

from diffit_jax.errors import UserError

REQUEUE = 75


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, calls `main()` and exits as the module docstring says.

  Args:
    main: takes nothing (flags are read from `flags.FLAGS`) and returns an exit
      code, None standing for 0.
  """
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold("info")
  app.run(lambda argv: _guard(main, argv), flags_parser=_parse_flags)


def _guard(main: Callable[[], int | None], argv: list[str]) -> int:
  try:
    if argv[1:]:
      raise UserError(
          f"unexpected argument {argv[1]!r}: options are written --name=value"
      )
    return main() or 0
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
