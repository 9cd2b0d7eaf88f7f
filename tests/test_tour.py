"""The tour: a notebook that runs, and was run."""

import json
import os
import re
import subprocess
import sys

import pytest

from commands import ROOT

TOUR = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
CODE = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def test_it_was_run_from_top_to_bottom():
  assert [cell["execution_count"] for cell in CODE] == [
    i + 1 for i in range(len(CODE))
  ]
  outputs = [output for cell in CODE for output in cell["outputs"]]
  assert not [x for x in outputs if x["output_type"] == "error"]
  pictures = [x for x in outputs if "image/png" in x.get("data", {})]
  assert len(pictures) >= 6
  text = "".join("".join(x.get("text", "")) for x in outputs)
  (steps,) = re.findall(r"750 steps in (\d+) s", text)
  assert 30 < int(steps) < 600  # ten minutes, and no run found finished
  (share,) = re.findall(r"recognised: (0\.\d+|1\.0+) of the samples", text)
  assert float(share) >= 0.95


@pytest.mark.slow
def test_it_runs(tmp_path):
  code = "\n".join("".join(cell["source"]) for cell in CODE)
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (share,) = re.findall(r"recognised: (\S+) of the samples", done.stdout)
  assert float(share) >= 0.95
