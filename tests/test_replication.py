"""The small replication resumes, refuses other settings, and sums up."""

import json

import pytest

from benchmarks import replication
from diffit_jax.errors import UserError

SETTINGS = replication.Settings(steps=4, num=16, debug=True)


def test_a_killed_run_goes_on_and_finished_ones_stay(
  tmp_path, data_dir, monkeypatch, capsys
):
  monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
  start = lambda **kwargs: replication.run_all(
    replication.choose(["tmsa"]), 1, SETTINGS, tmp_path, **kwargs
  )
  with monkeypatch.context() as patch:
    patch.setattr(replication, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      start()
  assert not (tmp_path / "results.json").exists()
  checkpoint = tmp_path / "runs" / "tmsa-0" / "checkpoints" / "4"
  written = checkpoint.stat().st_mtime_ns

  assert not start(max_runs=0)
  assert start()
  assert checkpoint.stat().st_mtime_ns == written  # trained once
  (run,) = json.loads((tmp_path / "results.json").read_text())
  assert run["settings"] == {"steps": 4, "num": 16, "debug": True}
  assert 0 <= run["recognised"] <= 1 and run["recognised_real"] > 0.98
  assert run["frechet_digits"] > 1 and run["loss"] > 10  # it learned nothing
  assert "plot: " in capsys.readouterr().out

  monkeypatch.setattr(replication, "run", lambda *_: 1 / 0)
  assert start()
  other = replication.Settings(steps=5, num=16, debug=True)
  with pytest.raises(UserError, match="'steps': 4.*use another --out"):
    replication.run_all(replication.choose(["tmsa"]), 1, other, tmp_path)


def test_an_unknown_variant_names_the_known_ones():
  with pytest.raises(UserError, match="--only=windows: .*tmsa.*window2"):
    replication.choose(["tmsa", "windows"])


def test_the_table_gives_mean_and_standard_deviation():
  run = {"variant": "window2", "parameters": 1234}
  runs = [
    run | {"recognised": a, "frechet_digits": 0.5, "loss": 30 + a}
    for a in (0.5, 0.6, 0.7)
  ]
  row = replication.table(runs).splitlines()[-1]
  assert row.endswith(
    "| 1,234 | 0.600 ± 0.100 | 0.500 ± 0.000 | 30.60 ± 0.10 | 3 |"
  )
