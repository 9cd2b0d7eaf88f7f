"""What every entry point shares: flag parsing, error lines and exit codes.

Exit code 0 means done, 75 (EX_TEMPFAIL) means "saved, start me again", and
anything else means not done, with one clear last line on stderr.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import gc
import logging as stdlib_logging
import os
import sys

from absl import app, flags, logging
from ml_collections import config_dict

from diffit_jax import config_files, environment, interrupt, paths
from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped

REQUEUE = 75
# Objects made since the last collection. Tracing a network makes very many that
# stay; at the 700 of Python 3.11, looking at them takes a quarter of the time.
_GC_THRESHOLD = 100_000
flags.disclaim_key_flags()  # --help lists them with the entry point's own


def run(
  main: Callable[..., int | None],
  positional: str | None = None,
  many: bool = False,
) -> None:
  """Parses the flags, calls `main` and exits as the module docstring says.

  Args:
    main: takes nothing (flags are read from `flags.FLAGS`), or the argument
      that `positional` names, and returns an exit code, None standing for 0.
    positional: what the one argument without a flag is called, if there is one.
    many: whether any number of such arguments is taken instead.
  """
  logging.set_verbosity(logging.INFO)
  logging.set_stderrthreshold("info")
  logging.get_absl_handler().addFilter(_is_ours_or_a_warning)
  logging.get_absl_handler().setFormatter(_Formatter())
  sys.stdout.reconfigure(errors="backslashreplace")  # it may be ASCII only
  sys.unraisablehook = _report_unraisable
  interrupt.handle()
  gc.set_threshold(_GC_THRESHOLD)
  try:
    app.run(
      lambda argv: _guard(main, argv, positional, many),
      flags_parser=_parse_flags,
    )
  except SystemExit as stop:
    asked_for_help = any(arg.startswith("--help") for arg in sys.argv[1:])
    sys.exit(0 if asked_for_help else stop.code)  # absl's help exits with 1
  except KeyboardInterrupt:  # while the flags were read
    _end_with(interrupt.MESSAGE, interrupt.CODE)


def _report_unraisable(found) -> None:
  """Passes over the reads of a damaged checkpoint that end after the first.

  Orbax closes their event loop at the first error, and each of the others then
  complains of that; the error itself is told.
  """
  if f"{found.exc_value!r}" != "RuntimeError('Event loop is closed')":
    sys.__unraisablehook__(found)


class _Formatter(stdlib_logging.Formatter):
  """The time, and how bad it is if it is: a line has room for what it says."""

  def format(self, record: stdlib_logging.LogRecord) -> str:
    time = self.formatTime(record, "%H:%M:%S")
    is_bad = record.levelno >= stdlib_logging.WARNING
    level = f"{record.levelname.lower()}: " if is_bad else ""
    return f"{time} {level}{super().format(record)}"


def _is_ours_or_a_warning(record) -> bool:
  """Hides the progress notes of libraries (Orbax writes 40 lines a save)."""
  ours = os.path.dirname(__file__)
  return record.levelno >= stdlib_logging.WARNING or record.pathname.startswith(
    ours
  )


def _guard(
  main: Callable[..., int | None],
  argv: list[str],
  positional: str | None,
  many: bool,
) -> int:
  arguments, num_wanted = argv[1:], 1 if positional else 0
  try:
    environment.pin()
    if len(arguments) < num_wanted:
      raise UserError(f"{positional} is missing (--help says what it may be)")
    if len(arguments) > num_wanted and not many:
      raise UserError(
        f"unexpected argument {arguments[num_wanted]!r}: options are written"
        " --name=value"
      )
    return main(*arguments) or 0
  except Stopped:
    return REQUEUE
  except UserError as error:
    message, code = str(error), 1
  except KeyboardInterrupt:
    message, code = interrupt.MESSAGE, interrupt.CODE
  except BrokenPipeError:  # stdout was closed early, as by `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  _end_with(message, code)


def _end_with(message: str, code: int) -> None:
  """Ends the process at once, with `message` as stderr's last line.

  Threads and tasks that a failed save left behind in libraries would otherwise
  write their own complaints below it, or hang the interpreter's end.
  """
  logging.flush()
  with contextlib.suppress(OSError):  # nobody may be reading any more
    sys.stdout.flush()
  last = os.dup(sys.stderr.fileno())
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
  # A path may be no UTF-8.
  os.write(last, f"{_line(message)}\n".encode(errors="backslashreplace"))
  os._exit(code)


def _line(error: object) -> str:
  return f"error: {' '.join(str(error).split())}"


def fail(error: object, code: int = 1) -> int:
  """Prints `error` as one last line on stderr; returns the exit code."""
  logging.flush()
  print(_line(error), file=sys.stderr, flush=True)
  return code


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except config_files.ConfigError as error:
    sys.exit(fail(error))
  except flags.Error as error:
    sys.exit(fail(_reason(error)))
  # ml_collections raises these for a field that a config lacks.
  except (AttributeError, KeyError, TypeError) as error:
    sys.exit(fail(_unknown_field(argv) or _reason(error)))


def _reason(error: Exception) -> str:
  return f"{error} (--help lists the flags)"


def _unknown_field(argv: list[str]) -> str | None:
  """What is wrong with the first --config.a.b=value that names no field."""
  given = dict(argument.split("=", 1) for argument in argv if "=" in argument)
  if "--config" not in given:
    return None
  parser = flags.FLAGS["config"].parser
  for path in given:
    if not path.startswith("--config."):
      continue
    section = parser.parse(given["--config"])
    for name in path.removeprefix("--config.").split("."):
      if not isinstance(section, config_dict.ConfigDict):
        return f"{path}: there is no field {name!r} below that of a plain value"
      if name not in section:
        return f"{path}: there is no field {name!r}, only {sorted(section)}"
      section = section[name]
  return None


class _PathParser(flags.ArgumentParser):
  """Expands `~`; everything else of a path is left as it is."""

  def parse(self, argument: str) -> str:
    return paths.expand(argument)


def define_path(
  name: str, help_text: str, default: str | None = None
) -> flags.FlagHolder:
  """Defines a flag that is a path, in which `~` works."""
  return flags.DEFINE(
    _PathParser(),
    name,
    default,
    help_text,
    serializer=flags.ArgumentSerializer(),
  )


def require_one_of(**values: str | None) -> None:
  """Refuses unless exactly one of the named flags was given."""
  if sum(value is not None for value in values.values()) != 1:
    names = " or ".join(f"--{name}=..." for name in values)
    raise UserError(f"give {'exactly one of ' * (len(values) > 1)}{names}")


def require_local(path: str, flag: str = "--out") -> None:
  """Refuses the address of a bucket where files are written in place."""
  if "://" in path:
    raise UserError(
      f"{flag}={path} is no local path: write to this machine's disk, then copy"
      " it there"
    )


def require_one_process() -> None:
  """Refuses to be one of several processes; wakes no device."""
  from diffit_jax.parallel import cluster

  found = cluster.detect(None, None, None, os.environ, cluster.has_tpu())
  num = found.num_processes or 1
  if found.kind == "tpu":
    num = cluster.num_tpu_hosts(os.environ)
  if num == 1:
    return
  hint = (
    "one with a TPU of its own, or with JAX_PLATFORMS=cpu"
    if found.kind == "tpu"
    else "as with srun --nodes=1 --ntasks=1"
  )
  raise UserError(
    f"this command is one process, and {found.kind} starts {num} here, which"
    f" would write the same files: start it once, on one host, {hint}"
  )


@dataclasses.dataclass(frozen=True)
class RuntimeFlags:
  """The flags that tell a process of which run it is a part."""

  coordinator: flags.FlagHolder
  num_processes: flags.FlagHolder
  process_id: flags.FlagHolder
  start_timeout: flags.FlagHolder
  heartbeat_timeout: flags.FlagHolder

  def distributed(self):
    """The context in which all processes of the run are together."""
    from diffit_jax.parallel import runtime

    cluster = runtime.detect(
      self.coordinator.value,
      self.num_processes.value,
      self.process_id.value,
      os.environ,
      runtime.has_tpu(),
    )
    return runtime.distributed(
      cluster, self.start_timeout.value, self.heartbeat_timeout.value
    )


def define_runtime_flags() -> RuntimeFlags:
  """Defines the flags of `RuntimeFlags`, once per program."""
  return RuntimeFlags(
    coordinator=flags.DEFINE_string(
      "coordinator",
      None,
      "HOST:PORT of process 0. Slurm and TPUs are found without these flags.",
    ),
    num_processes=flags.DEFINE_integer(
      "num_processes",
      None,
      "Total number of processes; 1 runs alone and ignores any cluster that is"
      " found.",
      1,
    ),
    process_id=flags.DEFINE_integer(
      "process_id", None, "Number of this process, from 0.", 0
    ),
    start_timeout=flags.DEFINE_integer(
      "start_timeout", 1800, "Seconds to wait for all processes to come.", 1
    ),
    heartbeat_timeout=flags.DEFINE_integer(
      "heartbeat_timeout",
      100,
      "Seconds without a sign of life after which a process counts as dead, and"
      " all others end.",
      1,
    ),
  )


def define_inception_flag() -> flags.FlagHolder:
  """Defines --inception, once per program."""
  return define_path(
    "inception",
    "Safetensors file with the weights of the FID Inception; docs/evaluation.md"
    " says how to get it.",
  )
