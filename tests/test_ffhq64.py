"""The real FFHQ-64 network on a folder of images: train, resume, sample."""

import numpy as np
from PIL import Image
import pytest

import commands


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> str:
  """A data directory with a small FFHQ-64 made of smooth colour patterns."""
  root = tmp_path_factory.mktemp("faces")
  source = root / "images1024x1024" / "00000"
  source.mkdir(parents=True)
  y, x = np.mgrid[:96, :96] / 96
  for i in range(12):
    waves = [np.sin(6 * (x * (i + c) / 8 + y * (i - c) / 9)) for c in range(3)]
    image = np.uint8(127.5 + 127 * np.stack(waves, axis=-1))
    Image.fromarray(image).save(source / f"{i:05d}.png")
  commands.succeed(
    f"prepare ffhq64 --source={source.parent} --data_dir={root}/data"
  )
  return f"{root}/data"


@pytest.mark.slow
def test_44_8_million_parameters_train_resume_and_sample(faces, tmp_path):
  run = (
    f"main --config=configs/ffhq64.py --workdir={tmp_path}/run"
    f" --data_dir={faces} --config.batch_size=2 --config.num_threads=1"
    " --config.save_every_steps=1 --config.sample_every_steps=0"
  )
  real = {"XLA_FLAGS": ""}  # optimised
  commands.succeed(f"{run} --config.total_steps=1", **real)
  err = commands.run(f"{run} --config.total_steps=2", **real).stderr
  assert "resuming at step 1 of 2" in err, err[-3000:]
  commands.succeed(
    f"sample --workdir={tmp_path}/run --out={tmp_path}/out --num=2 --steps=2"
    " --batch_size=2",
    **real,
  )
  with np.load(f"{tmp_path}/out/samples_2x64x64x3.npz") as file:
    assert file["arr_0"].shape == (2, 64, 64, 3) and "arr_1" not in file
    assert file["arr_0"].std() > 1
