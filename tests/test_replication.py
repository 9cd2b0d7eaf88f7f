"""The small replication resumes, refuses other settings, and sums up."""

from collections import Counter
import json

import pytest

from benchmarks import replication, replication_report
from commands import ROOT
from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped

SETTINGS = replication.Settings(steps=2, num=16, debug=True)


@pytest.mark.slow
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
  checkpoint = tmp_path / "runs" / "tmsa-0" / "checkpoints" / "2"
  written = checkpoint.stat().st_mtime_ns

  with pytest.raises(Stopped):
    start(max_runs=0)
  start()
  assert checkpoint.stat().st_mtime_ns == written  # trained once
  (run,) = json.loads((tmp_path / "results.json").read_text())
  assert run["settings"] == {"steps": 2, "num": 16, "debug": True}
  assert 0 <= run["recognised"] <= 1 and run["recognised_real"] > 0.98
  assert run["frechet_digits"] > 1 and run["loss"] > 10  # it learned nothing
  assert "plot: " in capsys.readouterr().out

  monkeypatch.setattr(replication, "run", lambda *_: 1 / 0)
  start()
  other = replication.Settings(steps=5, num=16, debug=True)
  with pytest.raises(UserError, match="'steps': 2.*use another --out"):
    replication.run_all(replication.choose(["tmsa"]), 1, other, tmp_path)
  (tmp_path / "runs" / "tmsa-0.json").write_text('{"settings":')
  with pytest.raises(UserError, match="tmsa-0.json is damaged: delete it"):
    start()


def test_an_unknown_variant_names_the_known_ones():
  with pytest.raises(UserError, match="--only=windows: .*tmsa.*window2"):
    replication.choose(["tmsa", "windows"])


def test_the_table_gives_spread_and_paired_differences():
  """Differences of 0.1, 0.2 and 0.3: mean 0.2, standard error 0.1 / sqrt 3."""
  runs = [
    dict(
      variant=name, seed=seed, parameters=1234, frechet_digits=0.5, loss=30 + x,
      recognised=x,
    )
    for name, values in (("tmsa", [0.5] * 3), ("window2", [0.6, 0.7, 0.8]))
    for seed, x in enumerate(values)
  ]  # fmt: skip
  row = replication_report.table(runs, replication.VARIANTS).splitlines()[-1]
  scores = "0.700 ± 0.100 | 0.500 ± 0.000 | 30.70 ± 0.10"
  assert row.endswith(f"| 1,234 | 3 | {scores} | +0.200 ± 0.058 |")


def test_the_report_shows_the_runs_that_are_kept():
  docs = ROOT / "docs"
  text = (docs / "replication.md").read_text()
  for name in ("replication.json", "replication_longer.json"):
    runs = json.loads((docs / name).read_text())
    assert replication_report.table(runs, replication.VARIANTS) in text
  runs = json.loads((docs / "replication.json").read_text())
  seeds = Counter(run["variant"] for run in runs)
  assert seeds.keys() == {v.name for v in replication.VARIANTS}
  assert min(seeds.values()) >= 3
