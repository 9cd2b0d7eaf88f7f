"""Every fault of `mutations` is caught by the tests that it names."""

import pytest

import mutations


def test_the_list_is_wide_enough():
  kinds = [mutation.kind for mutation in mutations.MUTATIONS]
  assert len(kinds) >= 25 and kinds.count("past fix") >= 5
  assert min(kinds.count(kind) for kind in kinds) >= 3


def test_every_fault_stands_in_its_file_once():
  for mutation in mutations.MUTATIONS:
    text = (mutations.ROOT / "diffit_jax" / mutation.file).read_text()
    assert text.count(mutation.old) == 1, mutation
    assert (mutations.ROOT / "tests" / mutation.tests[0]).exists(), mutation


@pytest.mark.slow
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=str)
def test_the_fault_is_caught(mutation):
  assert not mutations.survives(mutation)
