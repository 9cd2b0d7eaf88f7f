"""Two real processes: the numbers of one, a signal, a death, and going on."""

import json
import pathlib

import jax
import numpy as np
import pytest

from comparison import assert_same_network
from diffit_jax.run import checkpoint
from diffit_jax.training import program as program_lib
import two_processes as driver


def run_pair(workdir, data_dir, *fate) -> list[tuple[int, str]]:
  """Two processes of the driver: (exit code, stderr) of each."""
  common = [driver.__file__, str(workdir), data_dir]
  where = [f"localhost:{driver.free_port()}", "2"]
  done = driver.run_all([[*common, *where, str(i), *fate] for i in range(2)])
  return [(code, err) for code, _, err in done]


def notes(workdir, file="process_0") -> tuple[dict, dict]:
  """({step: loss}, {step: samples of its batch}) of one process.

  What was noted twice, before and after a death, must be the same.
  """
  losses, samples = {}, {}
  path = pathlib.Path(workdir) / f"{file}.jsonl"
  for line in path.read_text().splitlines():
    note = json.loads(line)
    if "loss" in note:
      key, value, found = note["step"], note["loss"], losses
    else:
      key, value, found = note["batch"], note["index"], samples
    assert found.setdefault(key, value) == value, (file, note)
  return losses, samples


def restored(workdir, devices):
  """The newest checkpoint on the given devices of this one process."""
  program = program_lib.build(driver.get_config(), devices)
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return program, checkpoints.restore(program.abstract)
  finally:
    checkpoints.close()


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
  """The workdir of one process with eight devices."""
  workdir = tmp_path_factory.mktemp("alone")
  driver.train(workdir, data_dir)
  return workdir


@pytest.fixture(scope="module")
def pair(data_dir, tmp_path_factory):
  """The workdir of two processes with four devices each, and what they said.

  SIGTERM to one of them ends both; one process with all eight devices goes on
  to the end.
  """
  workdir = tmp_path_factory.mktemp("pair")
  ended = run_pair(workdir, data_dir, "term", "4")
  assert [code for code, _ in ended] == [75, 75], ended
  stopped = checkpoint.list_steps(workdir)
  for i in range(2):
    (workdir / f"process_{i}.jsonl").rename(workdir / f"pair_{i}.jsonl")
  driver.train(workdir, data_dir)
  return workdir, stopped, [err for _, err in ended]


def test_a_signal_to_one_stops_both_at_the_same_step(pair):
  _, stopped, _ = pair
  assert len(stopped) == 2 - (stopped[-1] == 4) and 4 <= stopped[-1] <= 6


def test_a_polite_stop_says_nothing_frightening(pair):
  for err in pair[-1]:
    for word in driver.FRIGHTENING:
      assert word not in err, err


def test_two_processes_see_the_samples_of_one(alone, pair):
  _, whole = notes(alone)
  parts = [notes(pair[0], f"pair_{process}")[1] for process in range(2)]
  assert len(parts[1]) >= 4  # to its stop
  for step in parts[1]:
    first, second = (set(part[step]) for part in parts)
    assert len(first) == len(second) == 8 and not first & second
    assert first | second == set(whole[step])
  _, rest = notes(pair[0])
  assert rest and all(rest[step] == whole[step] for step in rest)


def test_two_processes_give_the_losses_of_one(alone, pair):
  losses, expected = notes(pair[0], "pair_0")[0], notes(alone)[0]
  assert max(losses) >= 4
  losses |= notes(pair[0])[0]
  assert sorted(losses) == sorted(expected) == list(range(1, 9))
  for step in expected:
    np.testing.assert_allclose(losses[step], expected[step], rtol=1e-6)


def test_two_processes_give_the_parameters_of_one(alone, pair):
  """Read by one process, on 8, 2 and 1 devices."""
  program, expected = restored(alone, jax.devices())
  _, eight = restored(pair[0], jax.devices())
  assert_same_network(program.model, eight.params, expected.params)
  for num in (2, 1):
    _, fewer = restored(pair[0], jax.devices()[:num])
    assert int(fewer.step) == 8
    jax.tree.map(np.testing.assert_array_equal, fewer, eight)


@pytest.mark.slow
def test_the_death_of_one_ends_both(data_dir, tmp_path):
  """And they go on together from what was saved."""
  killed = run_pair(tmp_path, data_dir, "kill", "6")
  assert killed[1][0] == -9 and killed[0][0] not in (0, 75, None), killed
  assert checkpoint.list_steps(tmp_path)[-1] == 4
  again = run_pair(tmp_path, data_dir)
  assert [code for code, _ in again] == [0, 0], again
  assert "resuming at step 4 of 8" in again[0][1]


@pytest.mark.slow
def test_the_death_of_all_changes_no_bit(data_dir, tmp_path):
  """SIGKILL to both while the checkpoint of step 4 is being written."""
  killed = run_pair(tmp_path / "killed", data_dir, "kill_all", "5")
  assert [code for code, _ in killed] == [-9, -9], killed
  assert checkpoint.list_steps(tmp_path / "killed") in ([], [4])
  for name in ("killed", "whole"):
    (tmp_path / name).mkdir(exist_ok=True)
    done = run_pair(tmp_path / name, data_dir)
    assert [code for code, _ in done] == [0, 0], done
    for _, err in done:
      for word in driver.FRIGHTENING:
        assert word not in err, err
  notes(tmp_path / "killed")
  _, one = restored(tmp_path / "killed", jax.devices()[:1])
  _, other = restored(tmp_path / "whole", jax.devices()[:1])
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fate, message",
  [("hang", "befall"), ("fail", "process 1: the disk of this host is gone")],
)
def test_a_process_that_hangs_or_fails_ends_both(
  fate, message, data_dir, tmp_path
):
  """One that hangs is alive, so that only its watchdog can tell."""
  done = run_pair(tmp_path, data_dir, fate, "3")
  assert message in done[1][1], done
  assert all(code not in (0, 75) for code, _ in done), done


@pytest.mark.slow
def test_the_command_on_two_processes(data_dir, tmp_path):
  """Through main: sample grids, metrics, traces, a cache with a torn entry."""
  folder = tmp_path / "run"

  def train(total_steps):
    common = f"""-m diffit_jax.main --config=configs/digits.py:debug
      --workdir={folder} --data_dir={data_dir} --num_processes=2
      --config.total_steps={total_steps} --config.sample_every_steps=2
      --profile_steps=3:5
      --coordinator=localhost:{driver.free_port()}""".split()
    done = driver.run_all(
      [[*common, f"--process_id={i}"] for i in range(2)],
      JAX_COMPILATION_CACHE_DIR=None,
    )
    assert [code for code, _, _ in done] == [0, 0], done
    return done

  train(2)
  (entry,) = (folder / "compilation_cache").glob("jit_step-*-cache")
  size = entry.stat().st_size
  entry.write_bytes(entry.read_bytes()[: size // 2])  # now the newest
  again = train(4)
  assert "resuming at step 2 of 4" in again[0][2]
  assert "which a kill had cut short" in again[0][2]
  assert entry.stat().st_size > size // 2
  assert "UserWarning" not in again[0][2]
  assert "waits: data " in again[0][2]
  assert sorted(p.name for p in (folder / "samples").iterdir()) == [
    "samples_edm_00000002.png",
    "samples_edm_00000004.png",
  ]
  assert len(list((folder / "tensorboard").glob("events*"))) == 2
  traces = list((folder / "plugins" / "profile").glob("*/*.xplane.pb"))
  assert len({trace.parent for trace in traces}) == 1  # one run of XProf's
  assert {trace.name for trace in traces} == {
    "process_0.xplane.pb",
    "process_1.xplane.pb",
  }
