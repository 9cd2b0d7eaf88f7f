"""The one place where a user's `~` becomes a home directory.

A shell expands `~` only at the beginning of a word, so that --workdir=~/runs
reaches a program as it was typed.
"""

import os

from diffit_jax.errors import UserError


def expand(path: str) -> str:
  """A path with `~` or `~name` at its beginning replaced by that home.

  Raises:
    UserError: there is no such home directory.
  """
  expanded = os.path.expanduser(path)
  if path.startswith("~") and expanded == path:
    home = path.split("/")[0]
    raise UserError(
      f"{path}: no home directory is known for {home}: set the variable HOME,"
      " or write the path in full"
    )
  return expanded
