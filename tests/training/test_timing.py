"""The split of a step's time, the trace of some, and what stops a run."""

import contextlib
import dataclasses
import pathlib
import sys
import time

import pytest

from diffit_jax.errors import UserError
from diffit_jax.run import checkpoint, workdir
from diffit_jax.training import program, timing
import two_processes


def test_the_parts_of_a_step_are_counted_per_step(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])

  def wait(part, seconds):
    with clock.waiting(part):
      now[0] += seconds

  clock = timing.StepClock()
  wait("data_wait", 100)  # before the first step is compiled
  assert not clock.is_running
  clock.restart(1)
  assert clock.scalars(1, 16) == {}
  wait("data_wait", 1)
  wait("checkpoint", 2)
  wait("data_wait", 1)
  now[0] += 4
  assert clock.scalars(3, 16) == {  # 8 seconds for 2 steps
    "seconds_per_step": 4,
    "images_per_second": 4,
    "seconds_data_wait": 1,
    "share_data_wait": 0.25,
    "seconds_checkpoint": 1,
    "share_checkpoint": 0.25,
  }
  clock.restart(3)
  now[0] += 1
  assert clock.scalars(4, 16)["seconds_data_wait"] == 0


def test_the_steps_to_profile():
  assert timing.parse_steps("10:13") == range(10, 13)
  assert not timing.parse_steps(None) and not timing.parse_steps("")
  for text in ("3", "a:b", "5:5", "7:3", "0:2", "-3:2", "1:2:3", ":"):
    with pytest.raises(UserError, match=f"--profile_steps={text}: write"):
      timing.parse_steps(text)


@pytest.mark.parametrize(
  "first, last, steps, traced",
  [
    (0, 9, range(3, 5), [(3, 4)]),
    (3, 9, range(3, 5), [(4, 4)]),  # resumed in the middle
    (5, 9, range(3, 5), []),  # and behind it
    (0, 3, range(3, 5), [(3, 3)]),  # stopped in the middle
    (0, 9, range(0), []),
  ],
)
def test_the_trace_covers_the_steps(
  first, last, steps, traced, monkeypatch, tmp_path
):
  seen, step = [], first
  profiler = timing.jax.profiler
  monkeypatch.setattr(
    profiler, "start_trace", lambda *_, **__: seen.append(step + 1)
  )
  monkeypatch.setattr(
    profiler, "stop_trace", lambda: seen.append((seen.pop(), step))
  )
  profile = timing.StepTrace(steps, tmp_path, contextlib.nullcontext)
  while step < last:
    profile.before(step + 1)
    step += 1
    profile.after(step, ())
  profile.close()
  assert seen == traced


def test_traces_of_all_processes_make_one_run_of_the_profile_page(
  monkeypatch, tmp_path
):
  """Two processes on one host, each of which the profiler calls `host.dom`."""
  profiler, folders = timing.jax.profiler, []

  def write(content):
    target = pathlib.Path(folders[-1]) / "plugins" / "profile" / "its own time"
    target.mkdir(parents=True)
    (target / "host.dom.xplane.pb").write_text(content)

  monkeypatch.setattr(
    profiler, "start_trace", lambda folder, **_: folders.append(folder)
  )
  monkeypatch.setattr(timing.jax, "process_count", lambda: 2)
  monkeypatch.setattr(timing.runtime, "on_process_0", lambda call: "10_20")
  for index in range(2):
    monkeypatch.setattr(timing.jax, "process_index", lambda i=index: i)
    monkeypatch.setattr(profiler, "stop_trace", lambda i=index: write(f"{i}"))
    profile = timing.StepTrace(range(3, 5), tmp_path, contextlib.nullcontext)
    profile.before(3)
    profile.close()
  written = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert {
    str(path.relative_to(tmp_path)): path.read_text() for path in written
  } == {
    "plugins/profile/10_20/process_0.xplane.pb": "0",
    "plugins/profile/10_20/process_1.xplane.pb": "1",
  }
  assert not any(pathlib.Path(folder).exists() for folder in folders)


@pytest.mark.parametrize("asked_for", ["", "cpu"])
def test_no_trace_where_libtpu_would_crash(asked_for, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "libtpu", object())
  before = timing.jax.config.jax_platforms
  timing.jax.config.update("jax_platforms", asked_for)
  try:
    timing.StepTrace(range(0), tmp_path, contextlib.nullcontext)
    if asked_for:  # libtpu is then left alone
      timing.StepTrace(range(1, 2), tmp_path, contextlib.nullcontext)
    else:
      with pytest.raises(UserError, match="set JAX_PLATFORMS=cpu"):
        timing.StepTrace(range(1, 2), tmp_path, contextlib.nullcontext)
  finally:
    timing.jax.config.update("jax_platforms", before)


def test_a_failed_save_in_the_background_stops_the_run_at_the_next_step(
  data_dir, tmp_path, monkeypatch
):
  """Not at the next logging point, or save, which are far."""
  config = two_processes.get_config()
  config.total_steps = config.save_every_steps = 100
  config.log_every_steps = 100
  build = program.build
  skip = lambda state, monitor, batch: (state, monitor)
  monkeypatch.setattr(
    program,
    "build",
    lambda *args: dataclasses.replace(build(*args), train_step=skip),
  )
  checks = []

  def check(_):
    checks.append(None)
    if len(checks) == 3:
      raise UserError("saving checkpoint 2 failed")

  monkeypatch.setattr(checkpoint.Checkpoints, "check", check)
  with pytest.raises(UserError, match="saving checkpoint 2 failed"):
    two_processes.train(tmp_path, data_dir, config=config)
  assert len(checks) == 3


def test_a_file_is_whole_or_not_there(tmp_path):
  path = workdir.path_of(tmp_path) / "file"
  workdir.write_whole(path, b"1")
  workdir.write_whole(path, b"22")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
  assert path.read_bytes() == b"22"
