"""The one exception that stands for a mistake of the user, not of the program.

Entry points print its text as a single last line on stderr and exit with
code 1 (`diffit_jax.cli`); anything else that is raised keeps its traceback.
"""


class UserError(ValueError):
  """What was wrong and what to do about it, in one sentence."""
