"""The table of metrics: complete, and what all lists of metrics are read from.

One row of a metric is all that names it: scores, titles, `--metrics`, the best
checkpoint and the docs follow.
"""

import importlib

import pytest

from commands import ROOT
from diffit_jax.errors import UserError
from diffit_jax.evaluation import metrics
from diffit_jax.evaluation.features import SPACES
from diffit_jax.evaluation.metrics import table

NAMES = [name for space in SPACES for name in table.names(space)]


@pytest.mark.parametrize("row", table.METRICS, ids=lambda row: row.name)
def test_a_row_is_complete(row):
  file, function = row.compute.split(".")
  module = importlib.import_module(f"{metrics.__name__}.{file}")
  assert callable(getattr(module, function))
  assert row.needs in {"pool", "spatial", "logits", "rows"}
  assert row.better in {"lower", "higher"}
  # Other spaces have neither spatial features nor logits.
  assert bool(row.elsewhere) == (row.needs in {"pool", "rows"})


def test_names_by_space():
  six = ("fid", "sfid", "inception_score", "precision", "recall", "kid")
  assert table.names("inception") == six
  assert table.names("pixels") == (
    *("frechet_pixels", "precision_pixels", "recall_pixels", "kernel_pixels"),
  )
  assert len(set(NAMES)) == len(NAMES)
  assert table.choose((), "inception") == six
  assert table.choose(("kid", "fid"), "inception") == ("fid", "kid")
  with pytest.raises(
    UserError, match="^--metrics=fid,x: 'x' is not among fid, sfid, incept"
  ):
    table.choose(("fid", "x"), "inception")


def test_titles():
  title = lambda name: table.title(name, 10)
  assert title("sfid") == "sFID"
  assert title("kid_standard_error") == "KID, s.e."
  assert title("recall_digits") == "recall (digits)"
  error = "kernel distance (pixels), s.e."
  assert title("kernel_pixels_standard_error") == error
  assert title("intra_fid") == "intra-FID"
  mean = "mean of the classes' Fréchet distances (digits)"
  assert title("intra_frechet_digits") == mean
  assert title("clip") == "clip"  # of another version


def test_the_best_checkpoint_may_go_by_distances_alone():
  distances = {name for name in NAMES if table.is_distance(name)}
  assert distances == {
    *("fid", "sfid", "kid", "frechet_digits", "kernel_digits"),
    *("frechet_pixels", "kernel_pixels"),
  }
  assert not table.is_distance("intra_fid") and not table.is_distance("loss")


def test_the_docs_name_every_metric():
  docs = (ROOT / "docs" / "evaluation.md").read_text().replace("\n", " ")
  for row in table.METRICS:
    assert row.title in docs, row.title


def test_the_public_functions():
  for name in metrics.__all__:
    assert callable(getattr(metrics, name))
  with pytest.raises(ImportError):
    from diffit_jax.evaluation.metrics import no_such_function  # noqa: F401
