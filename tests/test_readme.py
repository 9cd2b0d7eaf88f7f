"""What the documents tell to type: all there, all at work."""

import re

import numpy as np
from PIL import Image
import pytest

import commands
import readme_run


def test_the_documents_name_every_entry_point():
  text = "\n".join(readme_run.typed_commands())
  for entry in ("prepare", "main", "sample", "evaluate", "export", "plan"):
    assert f"python -m diffit_jax.{entry} " in text


def test_the_first_screen_is_short():
  lines = (commands.ROOT / "README.md").read_text().splitlines()
  assert len(lines) <= 120


def test_commands_run_in_order(readme):
  made = {path.name for path in readme.iterdir()}
  assert made >= {
    "samples",
    "more",
    "imagenet",
    "ffhq64.safetensors",
    "mine.safetensors",
    "card.json",
  }
  line = commands.last_error(
    "sample --workdir=runs/ffhq64 --out=labelled --labels=3",
    cwd=readme,
  )
  assert "unconditional model" in line


@pytest.mark.slow
def test_the_other_commands_run(readme):
  others = [
    command
    for command in readme_run.typed_commands()
    if readme_run.SLOW.search(command)
  ]
  assert len(others) >= 6
  for command in others:
    readme_run.run(command, readme)
  runs = {path.name for path in (readme / "runs").iterdir()}
  assert runs == {"ffhq64", "cats", "imagenet256", "tuned"}


def test_the_python_of_the_readme_makes_what_sample_makes(
  digits_run, tmp_path, monkeypatch
):
  file = tmp_path / "digits.safetensors"
  commands.succeed(f"export --workdir={digits_run} --out={file}")
  commands.succeed(
    f"sample --checkpoint={file} --out={tmp_path}/a --num=16 --labels=0-9"
  )
  text = (commands.ROOT / "README.md").read_text()
  (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
  shown, scope = [], {}
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
  exec(code, scope)
  with np.load("a/samples_16x8x8x3.npz", allow_pickle=False) as made:
    np.testing.assert_array_equal(
      np.repeat(scope["images"], 3, axis=-1), made["arr_0"]
    )
  (image,) = shown
  assert image.size == (1024, 64)
