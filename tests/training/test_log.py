"""The console's line of a logging point is short, and for reading."""

from diffit_jax import progress
from diffit_jax.training import log

PREFIX = "05:43:08 "  # the time, before every line of the log


def test_the_line_says_what_a_person_wants_to_know():
  values = {
    "loss": 0.123456,
    "seconds_per_step": 0.5,
    "images_per_second": 256.0,
    "share_data_wait": 0.031,
    "share_checkpoint": 0.25,
    "grad_norm": 1.0,  # and the rest is for the files
  }
  assert log.console_line(50, 750, values) == (
    "step 50/750, loss 0.1235, 256 images/s, waits: data 3% saves 25%,"
    " 5.8 min left"
  )
  values |= {"images_per_second": 12_345.6, "seconds_per_step": 0.06}
  line = log.console_line(250_000, 1_250_000, values)
  assert len(PREFIX + line) < 100
  assert log.console_line(1, 4, {"loss": 2.0}) == "step 1/4, loss 2"


def test_durations_have_the_unit_that_fits():
  seconds = (0.2, 59, 60, 200, 5 * 3600, 100 * 3600)
  assert [progress.duration(s) for s in seconds] == [
    *("0 s", "59 s", "1.0 min", "3.3 min", "5.0 h", "4.2 d")
  ]
