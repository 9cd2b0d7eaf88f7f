"""Config files: found, loaded and made the value of --config.

Config files import one another as `from configs import ffhq64`. While one is
loaded, `configs` is a package made of these folders, the first that has a
module giving it:

  1. the folder of the file itself, if it is a package called `configs`, so that
     neighbours find each other wherever they lie; else the package `configs`
     that Python finds from where the command was started;
  2. the folder that came with diffit_jax: in its repository beside the package,
     installed within it.

So a user's own `configs` hides a config of ours only where it has a file of the
same name and a file outside of ours is loaded, and is then named in the error.
"""

import importlib
import importlib.util
import os
import pathlib
import sys
import traceback
import types

from absl import flags
from ml_collections import config_dict, config_flags

from diffit_jax import paths, ranges
from diffit_jax.errors import UserError

_PACKAGE = "configs"
_HOME = pathlib.Path(__file__).parent
OURS = next(
  folder / _PACKAGE
  for folder in (_HOME, _HOME.parent)
  if (folder / _PACKAGE / "__init__.py").exists()
)
flags.disclaim_key_flags()


def define_flag(help_text: str) -> flags.FlagHolder:
  """Defines --config=FILE[:VARIANTS] and --config.FIELD=VALUE, once a program.

  Args:
    help_text: what --help says of it.
  """
  holder = config_flags.DEFINE_config_file("config", None, help_text)
  flags.FLAGS["config"].parser = _Parser()
  return holder


def required(holder: flags.FlagHolder) -> config_dict.ConfigDict:
  """The config of the flag, its paths expanded.

  Raises:
    UserError: the flag was not given, or a number is out of range.
  """
  if holder.value is None:
    raise UserError(
      "--config is missing: give a file, as --config=configs/digits.py, or the"
      f" name of one that came with diffit_jax: {', '.join(names())}"
    )
  config = holder.value
  if config.get("init_from"):
    config.init_from = paths.expand(config.init_from)
  if config.get("evaluation", {}).get("reference"):
    config.evaluation.reference = paths.expand(config.evaluation.reference)
  ranges.check(config)
  return config


def ours(name: str) -> types.ModuleType:
  """A config that came with diffit_jax, such as "digits", as a module."""
  _use([OURS])
  return importlib.import_module(f"{_PACKAGE}.{name}")


def names() -> list[str]:
  """The configs that came with diffit_jax, as --config takes them."""
  texts = {path.stem: path.read_text() for path in sorted(OURS.glob("*.py"))}
  return [name for name, text in texts.items() if "def get_config(" in text]


def load(file: str | pathlib.Path, arg: str | None = None):
  """What `get_config(arg)` of a config file returns.

  Args:
    file: path of the Python file, or one of `names()`.
    arg: variants, or None to call `get_config` without.

  Raises:
    UserError: no such file, no config file, or whatever is raised in it.
  """
  path = _find(str(file))
  folders = _folders(path)
  _use(folders)
  try:
    found = _execute(path).get_config(*([] if arg is None else [arg]))
  except Exception as error:
    raise UserError(_reason(path, error, folders)) from error
  if not isinstance(found, config_dict.ConfigDict):
    raise UserError(
      f"get_config() of {file} returns {type(found).__name__}, not a ConfigDict"
    )
  return found


def _find(file: str) -> pathlib.Path:
  """The config file that is meant."""
  path = pathlib.Path(paths.expand(file))
  if path.suffix != ".py":
    if file in names():
      return OURS / f"{file}.py"
    raise UserError(
      f"{file} is no config file: give a Python file such as"
      f" configs/digits.py, or one of {', '.join(names())}; a run's own"
      " config.json is read by --workdir"
    )
  if not path.is_file():
    ours = path.parts[:-1] == (_PACKAGE,) and path.stem in names()
    hint = f"; --config={path.stem} is the one that came with diffit_jax"
    raise UserError(f"config file not found: {file}{hint * ours}")
  return path


class _Parser(flags.ArgumentParser):
  """From the text of --config to the config."""

  def parse(self, path: str) -> config_dict.ConfigDict:
    file, colon, arg = path.partition(":")
    try:
      config = load(file, arg if colon else None)
    except UserError as error:  # absl wraps a ValueError in words of its own
      raise ConfigError(str(error)) from error
    return config.lock()


class ConfigError(flags.Error):
  """A config that cannot be had, in one sentence."""


def _execute(path: pathlib.Path) -> types.ModuleType:
  """Runs the file: as a module of `configs` if it lies in that package."""
  if str(path.parent.resolve()) == sys.modules[_PACKAGE].__path__[0]:
    return importlib.import_module(f"{_PACKAGE}.{path.stem}")
  spec = importlib.util.spec_from_file_location("config_file", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
  """What `configs` is made of while `path` is loaded."""
  home = path.parent.resolve()
  if home == OURS.resolve():
    return [home]
  if home.name == _PACKAGE and (home / "__init__.py").exists():
    return [home, OURS]
  return [*_importable(), OURS]


def _importable() -> list[pathlib.Path]:
  """The folders of the package `configs` that Python finds, if any."""
  sys.modules.pop(_PACKAGE, None)  # one that `_use` made says nothing of it
  try:
    spec = importlib.util.find_spec(_PACKAGE)
  except (ImportError, ValueError):
    return []
  found = (spec and spec.submodule_search_locations) or []
  return [pathlib.Path(folder).resolve() for folder in found]


def _use(folders: list[pathlib.Path]) -> None:
  """Makes `configs` a package of these folders, and forgets any other."""
  wanted = list(dict.fromkeys(str(folder.resolve()) for folder in folders))
  present = sys.modules.get(_PACKAGE)
  if list(getattr(present, "__path__", [])) == wanted:
    return
  for name in list(sys.modules):
    if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
      del sys.modules[name]
  package = types.ModuleType(_PACKAGE)
  package.__path__ = wanted
  sys.modules[_PACKAGE] = package


def _reason(
  path: pathlib.Path, error: Exception, folders: list[pathlib.Path]
) -> str:
  """One sentence: what went wrong in the config file, and where."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, SyntaxError):
    return f"config {error.filename}, line {error.lineno}: {error.msg}"
  said = f"{type(error).__name__}: {error}"
  frames = traceback.extract_tb(error.__traceback__)
  files = [os.path.realpath(frame.filename) for frame in frames]
  # Config files raise ValueError for their own users.
  homes = [str(path.parent.resolve()), *map(str, folders)]
  if isinstance(error, ValueError) and os.path.dirname(files[-1]) in homes:
    return str(error)
  own = str(path.resolve())
  lines = [f.lineno for f, file in zip(frames, files) if file == own]
  where = f"config {path}" + (f", line {lines[-1]}" if lines else "")
  if hiding := _hiding(folders):
    said += (
      f" ({hiding} hides the config of the same name that came with"
      " diffit_jax: rename it)"
    )
  return f"{where}: {said}"


def _hiding(folders: list[pathlib.Path]) -> pathlib.Path | None:
  """A file of a user's `configs` that stands before one of ours."""
  found = (
    folder / file.name
    for folder in folders
    if folder.resolve() != OURS.resolve()
    for file in sorted(OURS.glob("[a-z]*.py"))
    if (folder / file.name).exists()
  )
  return next(found, None)
