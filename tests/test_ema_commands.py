"""Averages of any width, from training to a file, as a user makes them."""

import json

import numpy as np
import pytest
import safetensors

import commands

CONFIG = "--config=configs/digits.py:ema=power,debug --config.total_steps=8"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
  """A finished run of 8 steps with a snapshot after every one."""
  folder = tmp_path_factory.mktemp("ema") / "run"
  commands.succeed(
    f"main {CONFIG} --config.sample_every_steps=0 --workdir={folder}"
    f" --data_dir={data_dir}"
  )
  return folder


def read(path) -> tuple[dict, dict]:
  with safetensors.safe_open(path, framework="numpy") as file:
    return {name: file.get_tensor(name) for name in file.keys()}, (
      file.metadata()
    )


@pytest.mark.slow
def test_a_width_between_two_is_exported_and_sampled(workdir, tmp_path):
  snapshots = sorted(int(p.name) for p in (workdir / "snapshots").iterdir())
  assert snapshots == list(range(1, 9))
  made = {}
  for ema in ("0.08", "0.1", "p10"):
    file = tmp_path / f"{ema}.safetensors"
    out = commands.succeed(
      f"export --workdir={workdir} --ema={ema} --out={file}"
    )
    assert f"step 8, ema {ema}" in out
    made[ema] = read(file)
  tensors, header = made["0.08"]
  assert header["ema"] == "0.08" and header["step"] == "8"
  assert "sigma_rel 0.08 at step 8, from 16 stored" in header["about"]
  assert "about" not in made["p10"][1]
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(made["0.1"][0][name], made["p10"][0][name])
    assert np.isfinite(tensor).all()
  assert any((tensors[n] != made["p10"][0][n]).any() for n in tensors)

  options = "--num=2 --steps=2 --seed=1"
  commands.succeed(
    f"sample --workdir={workdir} --ema=0.08 --out={tmp_path}/a {options}"
  )
  file = tmp_path / "0.08.safetensors"
  commands.succeed(
    f"sample --checkpoint={file} --ema=0.08 --out={tmp_path}/b {options}"
  )
  settings = [
    json.loads((tmp_path / folder / "sampling.json").read_text())
    for folder in "ab"
  ]
  assert settings[0]["ema"] == settings[1]["ema"] == "0.08"
  assert settings[0]["weights_sha256"] == settings[1]["weights_sha256"]


@pytest.mark.parametrize(
  "ema, message",
  [
    ("0.4", "sigma_rel=0.4 must be above 0 and at most 0.2887"),
    ("swa", r"this run has ['edm', 'p05', 'p10'], or 'none', or a relative"),
  ],
)
@pytest.mark.slow
def test_what_is_no_width(ema, message, workdir, tmp_path):
  line = commands.last_error(
    f"export --workdir={workdir} --ema={ema} --out={tmp_path}/x.safetensors"
  )
  assert message in line
  assert not list(tmp_path.iterdir())
