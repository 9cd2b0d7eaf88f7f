"""The images' recipes: what they copy is there, what they install installs."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from commands import ROOT

FOLDER = ROOT / "launch" / "docker"
KINDS = ["gpu", "tpu"]


def instructions(kind: str) -> list[tuple[str, str]]:
  """(name, rest) of every line of a recipe."""
  text = (FOLDER / f"{kind}.Dockerfile").read_text().replace("\\\n", " ")
  lines = [line for line in text.splitlines() if line and line[0] != "#"]
  return [tuple(line.split(maxsplit=1)) for line in lines]


def copied(kind: str) -> list[tuple[list[str], str]]:
  """(sources, target) of every COPY."""
  found = [rest.split() for name, rest in instructions(kind) if name == "COPY"]
  return [(sources, target) for *sources, target in found]


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_the_repository_and_starts_the_program(kind):
  names = [name for name, _ in instructions(kind)]
  assert names[0] == "FROM" and {*names} <= {
    *("FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"),
  }
  sources = {name for group, _ in copied(kind) for name in group}
  assert all((ROOT / name).exists() for name in sources)
  assert sources >= {"constraints.txt", "setup.py", "diffit_jax", "configs"}
  found = dict(instructions(kind))
  (version,) = re.findall(r"^python:(\d\.\d+)-slim$", found["FROM"])
  assert f'python_version >= "{version}"' in (
    ROOT / "constraints.txt"
  ).read_text()
  job = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())
  (hosts,) = job["spec"]["replicatedJobs"]
  pod = hosts["template"]["spec"]["template"]["spec"]
  command = yaml.safe_load(found["CMD"])
  assert command[:3] == pod["containers"][0]["command"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_install_lines_work_in_an_empty_environment(kind, tmp_path):
  """CUDA's 3 GB are only resolved; here stands what runs without Docker."""
  image = tmp_path / "image"
  image.mkdir()
  for sources, target in copied(kind):
    for name in sources:
      place = image / target / (name if target == "./" else "")
      copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
      copy(ROOT / name, place)
  subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
  python = tmp_path / "venv/bin/python"
  env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
  for name, line in instructions(kind):
    if name != "RUN":
      continue
    command = shlex.split(line)
    assert command[:4] == ["python", "-m", "pip", "install"]
    dry = ["--dry-run"] * (kind == "gpu")
    subprocess.run(
      [python, *command[1:4], *dry, "--quiet", *command[4:]],
      cwd=image,
      env=env,
      check=True,
      timeout=900,
    )
  if kind == "gpu":
    return
  (start,) = (line for name, line in instructions(kind) if name == "CMD")
  done = subprocess.run(
    [python, *yaml.safe_load(start)[1:]],
    cwd=image,
    env=env | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and "--config" in done.stdout, done.stderr
