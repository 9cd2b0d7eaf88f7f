"""When what is done every so many steps is due, and what is made up for."""

import pytest

from diffit_jax.training.actions import Action


@pytest.mark.parametrize(
  "every, due", [(4, [4, 8, 10]), (5, [5, 10]), (20, [10]), (0, [])]
)
def test_an_action_is_due_at_its_interval_and_at_the_last_step(every, due):
  action = Action(every, lambda now: None)
  assert [step for step in range(1, 11) if action.is_due(step, 10)] == due
