"""The wheel and the source archive in environments of their own (`make dist`).

They need the package index. What is installed is what stands in
constraints.txt.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import urllib.request
import zipfile

import numpy as np
import pytest

from commands import ROOT

pytestmark = pytest.mark.slow
MINE = """
from configs import digits

def get_config(arg=None):
  config = digits.get_config(arg)
  config.name = "mine"
  return config
"""
ENVIRONMENT = {
  name: value
  for name, value in os.environ.items()
  if not name.startswith(("PYTHON", "XLA"))
} | {"JAX_PLATFORMS": "cpu"}


def run(*command, cwd, fails=False) -> str:
  """Output of a command that succeeds, or what one that fails says."""
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert (done.returncode != 0) == fails, done.stderr[-3000:]
  return done.stderr if fails else done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> pathlib.Path:
  """The folder with both, built unless $DIST names one."""
  if "DIST" in os.environ:
    return ROOT / os.environ["DIST"]
  folder = tmp_path_factory.mktemp("dist")
  run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=ROOT)
  return folder


@pytest.fixture(scope="session")
def installed(dist, tmp_path_factory) -> pathlib.Path:
  """The folder of the programs of an environment with the wheel."""
  place = tmp_path_factory.mktemp("environment")
  run(sys.executable, "-m", "venv", place / "venv", cwd=place)
  (wheel,) = dist.glob("*.whl")
  pip = [place / "venv/bin/python", "-m", "pip", "install", "--quiet"]
  run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=place)
  return place / "venv/bin"


@pytest.fixture
def empty(tmp_path) -> pathlib.Path:
  return tmp_path


def test_the_wheel_holds_the_package_and_its_configs(dist):
  (wheel,) = dist.glob("*.whl")
  names = set(zipfile.ZipFile(wheel).namelist())
  assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
    "diffit_jax"
  }
  for path in (ROOT / "configs").glob("*.py"):
    assert f"diffit_jax/configs/{path.name}" in names
  assert "diffit_jax/py.typed" in names


def test_the_source_archive_makes_the_same_wheel(dist, tmp_path):
  (archive,) = dist.glob("*.tar.gz")
  with tarfile.open(archive) as file:
    file.extractall(tmp_path, filter="data")
  (source,) = tmp_path.iterdir()
  run(sys.executable, "-m", "build", "--wheel", source, cwd=tmp_path)
  contents = [
    {name: file.read(name) for name in file.namelist()}
    for file in (
      zipfile.ZipFile(next(folder.glob("*.whl")))
      for folder in (dist, source / "dist")
    )
  ]
  ours, again = (
    {k: v for k, v in each.items() if "dist-info" not in k} for each in contents
  )
  assert ours == again


def test_train_sample_and_export_from_an_empty_folder(installed, empty):
  diffit = installed / "diffit"
  assert "  train " in run(diffit, "--help", cwd=empty)
  run(diffit, "prepare", "digits", "--data_dir=data", cwd=empty)
  train = (diffit, "train", "--data_dir=data")
  run(*train, "--config=digits:debug", "--workdir=runs/digits", cwd=empty)
  run(
    *(diffit, "sample", "--workdir=runs/digits", "--num=2", "--out=samples"),
    cwd=empty,
  )
  with np.load(empty / "samples/samples_2x8x8x3.npz") as file:
    assert file["arr_0"].shape == (2, 8, 8, 3)
  file = "--out=digits.safetensors"
  run(diffit, "export", "--workdir=runs/digits", file, cwd=empty)
  (empty / "mine.py").write_text(MINE)
  said = run(*train, "--config=mine.py:debug", "--dry_run", cwd=empty)
  assert "mine" in said and "parameters:          2,570" in said


def test_a_package_called_configs_hides_nothing(installed, empty):
  (empty / "configs").mkdir()
  (empty / "configs/__init__.py").write_text("raise SystemExit(3)")
  (empty / "configs/common.py").write_text("raise SystemExit(3)")
  for start in (
    (installed / "diffit", "train"),
    (installed / "python", "-m", "diffit_jax.main"),
  ):
    said = run(*start, "--config=digits:debug", "--dry_run", cwd=empty)
    assert "parameters:          2,570" in said
  (empty / "configs/__init__.py").write_text("")
  (empty / "configs/common.py").unlink()
  (empty / "configs/mine.py").write_text(MINE)
  start = (installed / "diffit", "train", "--dry_run")
  said = run(*start, "--config=configs/mine.py:debug", cwd=empty)
  assert "mine" in said and "parameters:          2,570" in said


def test_the_three_commands_of_the_readme(dist, tmp_path):
  """From the wheel to samples and to the page, the demo in its debug form."""
  text = (ROOT / "README.md").read_text()
  install, demo, explore = (
    re.search(rf"^{start}.*?(?=  #|$)", text, re.M)[0].strip()
    for start in ("pip install '?diffit", "diffit demo", "diffit explore")
  )
  run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
  programs, empty = tmp_path / "venv/bin", tmp_path / "empty"
  empty.mkdir()
  pip, *arguments, wheel = shlex.split(install)
  pinned = ["--quiet", "-c", ROOT / "constraints.txt"]
  run(programs / pip, *arguments, *pinned, dist / wheel, cwd=empty)
  typed = lambda command: [programs / command.split()[0], *command.split()[1:]]
  said = run(*typed(demo), "--variant=debug", cwd=empty)
  assert "recognised: " in said and list(empty.rglob("grid.png"))
  page = subprocess.Popen(
    list(map(str, [*typed(explore), "--port=0"])),
    cwd=empty,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    (address,) = re.findall(r"page: (http://\S+)", page.stdout.readline())
    with urllib.request.urlopen(address, timeout=60) as answer:
      assert answer.status == 200 and b"diffit" in answer.read().lower()
  finally:
    page.kill()
    page.wait()


def test_what_an_extra_holds_is_asked_for_in_one_line(installed, empty):
  (empty / "run").mkdir()
  said = run(
    *(installed / "diffit", "explore", "--workdir=run"), cwd=empty, fails=True
  )
  assert "[web]" in said.splitlines()[-1], said[-2000:]
