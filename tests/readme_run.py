"""Types the documents' commands, in their debug form and on small data.

What they make is what several test files look at: see `conftest.readme`.
"""

import json
import pathlib
import re
import zipfile

import jax
import numpy as np
from PIL import Image

import commands
from configs import imagenet256
from diffit_jax import models
from diffit_jax.interop import files, save_official
import inception_fill
from tiny_vae import write_vae

NUM = 6  # samples, few, as Inception takes its time on a CPU
# What the README says -> what fits the small data made here.
DEBUG = {
  r"(configs/\w+\.py)": r"\1:debug",
  r"(configs/ffhq64\S+)": r"\1 --config.model.channel_mult=(1,)",
  r"(main .*--workdir=runs/(cats|ffhq64|tuned))":
  r"\1 --config.total_steps=2"
  " --config.sample_every_steps=0",
  r"--num=\d+": f"--num={NUM}",
  r"(--out=more)": r"\1 --num=2",
  r"(diffit_jax\.evaluate)": rf"\1 --batch_size={NUM}",
  r"--resolution=(256|512)": "--resolution=32",
  r"--topology=\S+": "--topology=cpu:4",
}
DOCUMENTS = (
  *("README.md", "docs/training.md", "docs/sampling.md", "docs/latents.md"),
)
# `diffit` needs the wheel, see test_package.py.
SKIPPED = (
  *("python -m venv", "pip install", "export ", "#", "make ", "diffit "),
)
SLOW = re.compile(r"--dry_run|cats|diffit_jax\.plan|512")  # typed by test-slow


def typed_commands() -> list[str]:
  """Every line of the documents' code blocks once, continued lines joined."""
  text = "\n".join((commands.ROOT / name).read_text() for name in DOCUMENTS)
  blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
  typed = "\n".join(code for language, code in blocks if not language)
  lines = typed.replace("\\\n", " ").splitlines()
  lines = [line.split("#")[0].strip() for line in lines]
  wanted = [line for line in lines if line and not line.startswith(SKIPPED)]
  return list(dict.fromkeys(wanted))


def run_all(root: pathlib.Path) -> None:
  """Makes the data and runs the commands; outputs.json has what they print."""
  _write_inputs(root)
  outputs = {
    command: run(command, root)
    for command in typed_commands()
    if not SLOW.search(command)
  }
  (root / "outputs.json").write_text(json.dumps(outputs))


def run(command: str, root: pathlib.Path) -> str:
  """What it prints in its debug form."""
  for pattern, replacement in DEBUG.items():
    command = re.sub(pattern, replacement, command)
  return commands.succeed(
    command.removeprefix("python -m diffit_jax."),
    cwd=root,
    TFDS_DATA_DIR=str(root / "data"),
  )


def _write_inputs(root: pathlib.Path) -> None:
  """Everything that the commands name."""
  (root / "configs").symlink_to(commands.ROOT / "configs")
  rng = np.random.default_rng(0)
  pixels = lambda: rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)
  for i in range(12):
    for name in (f"images1024x1024/{i:05d}", f"ILSVRC/train/n{i % 3:08d}/{i}"):
      path = root / f"{name}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels()).save(path)
  with zipfile.ZipFile(root / "cats.zip", "w") as archive:
    for path in sorted((root / "images1024x1024").iterdir()):
      archive.write(path, path.name)
  write_vae(root / "sd-vae-ft-ema", block_out_channels=[4, 8, 8, 8])
  inception_fill.write(root / "inception.safetensors")
  config = imagenet256.get_config("debug")
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32),
    files.parameter_shapes(config),
  )
  save_official(
    root / "diffit_256.safetensors", models.make_model(config.model), params
  )
