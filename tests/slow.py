"""Cases of a parametrized test that only `make test-slow` runs."""

from collections.abc import Collection, Iterable

import pytest


def slow(*values):
  """One such case."""
  return pytest.param(*values, marks=pytest.mark.slow)


def all_but(fast: Collection, values: Iterable) -> list:
  """The values of one argument: those of `fast` run always, the others slow."""
  return [value if value in fast else slow(value) for value in values]
