"""The console command, from a folder that holds nothing of the project."""

import re
import subprocess
import sys

import pytest

from commands import ROOT
from diffit_jax import __version__, console


def run(*arguments, cwd) -> subprocess.CompletedProcess:
  """As typed, from elsewhere."""
  return subprocess.run(
    [sys.executable, "-P", "-m", "diffit_jax.console", *arguments],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_it_lists_every_entry_point(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["diffit"])
  console.main()
  said = capsys.readouterr().out
  for name in console.COMMANDS:
    assert re.search(rf"^  {name} +[A-Z]\w*", said, re.M), name
  modules = {
    path.stem
    for path in (ROOT / "diffit_jax").glob("*.py")
    if "cli.run(" in path.read_text()
  }
  assert modules == set(console.COMMANDS.values())


def test_a_packaged_config_by_its_name(tmp_path):
  """It is read, as the fields that it has are told."""
  done = run("train", "--config=digits:debug", "--config.x=1", cwd=tmp_path)
  assert "no field 'x', only ['batch_size'" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["teach"], "no command 'teach': use one of train, sample,"),
    (["train"], "config is missing: give .*that came .*: cifar10, .*ffhq64"),
    (["train", "--config=digit"], "digit is no config file: .*one of cifar10"),
    (
      ["train", "--config=configs/ffhq64.py"],
      "not found: configs/ffhq64.py; --config=ffhq64 is the one that came",
    ),
  ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
  done = run(*arguments, cwd=tmp_path)
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and re.search(message, line), line


def test_the_version_stands_in_one_place(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["diffit", "--version"])
  console.main()
  assert capsys.readouterr().out == f"diffit_jax {__version__}\n"
  cited = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {__version__}\n" in cited
  assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
