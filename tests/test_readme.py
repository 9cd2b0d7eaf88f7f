"""The README's commands, as `readme_run` types them: all there, all at work."""

import commands
from readme_run import readme_commands


def test_the_readme_names_every_entry_point():
  text = "\n".join(readme_commands())
  for entry in ("prepare", "main", "sample", "evaluate", "export", "plan"):
    assert f"python -m diffit_jax.{entry} " in text


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
  runs = {path.name for path in (readme / "runs").iterdir()}
  assert runs == {"ffhq64", "cats", "imagenet256", "tuned"}
