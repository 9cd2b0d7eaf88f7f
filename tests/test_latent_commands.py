"""The latent model's commands in their debug form, and what users get wrong."""

import json
import re

import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

import commands
from slow import slow
from tiny_vae import write_vae

LATENT = "configs/imagenet256.py:debug"
NPZ = "samples_3x32x32x3.npz"


@pytest.fixture(scope="module")
def folder(readme, tmp_path_factory):
  """vae/, other_vae/, ImageNet-like images/, and both kinds of data sets."""
  root = tmp_path_factory.mktemp("latent")
  (root / "data").mkdir()
  for name, made in {
    "vae": "sd-vae-ft-ema",
    "images": "ILSVRC/train",
    "data/imagenet256_latents": "data/imagenet256_latents",
  }.items():
    (root / name).symlink_to(readme / made)
  blocks = {"block_out_channels": [4, 8, 8, 8]}  # sides are divided by 8
  write_vae(root / "other_vae", 1, **blocks)
  write_vae(root / "scaled_vae", scaling_factor=0.5, **blocks)
  write_vae(root / "wide_vae", latent_channels=8, **blocks)
  commands.succeed(
    f"prepare image_folder --source={root}/images --resolution=32 --crop=adm"
    f" --data_dir={root}/data --name=imagenet256"
  )
  return root


@pytest.fixture(scope="module")
def workdir(readme):
  """A finished debug run on the prepared latents."""
  return readme / "runs/imagenet256"


def images(folder, name=NPZ):
  with np.load(folder / name, allow_pickle=False) as file:
    return file["arr_0"], file["arr_1"]


def test_training_on_latents_writes_grids(workdir):
  grid = Image.open(workdir / "samples" / "samples_constant_00000004.png")
  assert min(grid.size) > 64
  kept = json.loads((workdir / "attention.json").read_text())
  assert kept == {"attention": "xla", "device": "cpu"}  # what auto stood for


@pytest.mark.slow
def test_resume_encodes_images_on_the_fly(folder):
  run = (
    f"main --config={LATENT},data=images --workdir={folder}/fly"
    f" --data_dir={folder}/data --config.save_every_steps=1"
  )
  line = commands.last_error(run)
  assert "needs the VAE" in line and "--vae=" in line
  run += f" --vae={folder}/vae"
  commands.succeed(f"{run} --config.total_steps=1")
  err = commands.run(f"{run} --config.total_steps=2").stderr
  assert "resuming at step 1 of 2" in err, err[-2000:]
  assert "attention=auto is xla on cpu: model.attention='pallas' needs" in err


@pytest.mark.slow
def test_released_layout_goes_out_and_comes_back(workdir, folder, tmp_path):
  """export official, sample from it, convert it, train from it."""
  sample = f"sample --vae={folder}/vae --num=3 --labels=0-2 --batch_size=3"
  commands.succeed(f"{sample} --workdir={workdir} --out={tmp_path}/a")
  file = tmp_path / "diffit.safetensors"
  commands.succeed(f"export --workdir={workdir} --out={file} --layout=official")
  tensors = safetensors.numpy.load_file(file)
  assert tensors["blocks.1.attn.relative_position_index"].dtype == np.int64
  assert tensors["pos_embed"].shape == (1, 4, 16)
  line = commands.last_error(f"{sample} --checkpoint={file} --out={tmp_path}/x")
  assert "carries no config" in line
  config = f"--config={LATENT}"
  commands.succeed(f"{sample} --checkpoint={file} {config} --out={tmp_path}/b")
  np.testing.assert_array_equal(
    images(tmp_path / "a")[0], images(tmp_path / "b")[0]
  )
  again = tmp_path / "native.safetensors"
  commands.succeed(f"export --checkpoint={file} {config} --out={again}")
  commands.succeed(f"{sample} --checkpoint={again} --out={tmp_path}/c")
  found, labels = images(tmp_path / "c")
  np.testing.assert_array_equal(found, images(tmp_path / "a")[0])
  assert labels.tolist() == [0, 1, 2]
  err = commands.run(
    f"main {config} --workdir={tmp_path}/tuned --data_dir={folder}/data"
    f" --config.init_from={file} --config.total_steps=1"
  ).stderr
  assert "no sample grids: --vae was not given" in err, err[-2000:]
  line = commands.last_error(
    f"sample --checkpoint={file} {config} --config.model.depth=3"
    f" --out={tmp_path}/x"
  )
  assert "depth is 2 there and 3 in the config" in line
  assert not (tmp_path / "x").exists()


def test_without_a_vae_latents_are_written_and_said_to_be(workdir, tmp_path):
  out = commands.succeed(
    f"sample --workdir={workdir} --out={tmp_path}/z --num=2"
  )
  assert "latents, since --vae was not given" in out
  with np.load(tmp_path / "z" / "latents_2x4x4x4.npz") as file:
    assert file["arr_0"].dtype == np.float32 and file["arr_0"].std() > 0


@pytest.mark.slow
def test_another_vae_is_warned_of_and_options_reach_the_solver(
  workdir, folder, tmp_path
):
  """And the skipped evaluations are counted; test_skip.py has every solver."""
  done = commands.run(
    f"sample --workdir={workdir} --out={tmp_path}/z --num=2 --solver=ddim"
    f" --steps=6 --vae={folder}/other_vae --solver_options=eta=1"
    " --guidance_tolerance=1e-3 --guidance_channels=0 --labels=3"
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert "trained on latents of another VAE" in done.stderr
  assert "eta=1" in (tmp_path / "z" / "sampling.json").read_text()
  assert re.search(
    r"guidance: [1-5] of 6 unconditional .* within 0.001", done.stderr
  ), done.stderr[-2000:]
  assert re.search(r"largest change .* \d", done.stderr)


@pytest.mark.parametrize(
  "options, message",
  [
    ("--labels=4", "beyond the model's classes 0..2"),
    ("--steps=1001", "steps=1001 must be from 1 to 1000"),
    slow("--steps=0", "steps=0"),
    slow("--solver=edm_heun", "not for a model of diffusion.kind='adm'"),
    ("--guidance_scale=nan", "must be finite"),
    slow("--guidance_interval=a,b", "write two noise levels"),
    ("--solver_options=eta=1", "solver 'ddpm' has no option 'eta'"),
    slow("--vae={folder}/images", "config.json"),
    ("--vae={folder}/wide_vae", "makes 8 channels from 3"),
    ("--vae={folder}/scaled_vae", "scaling_factor 0.5.*0.18215"),
  ],
)
def test_wrong_sampling_input(options, message, workdir, folder, tmp_path):
  line = commands.last_error(
    f"sample --workdir={workdir} --out={tmp_path}/x"
    f" {options.format(folder=folder)}"
  )
  assert re.search(message, line), line
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "options, message",
  [
    ("--vae={folder}/other_vae", "VAE"),
    ("--config.autoencoder.scaling_factor=0.5", "0.5.*0.18215|0.18215.*0.5"),
    slow("--config.model.channels=8", "8 .*4|4 .*8"),
    ("--config.model.input_size=8", "input_size=8 must be the side"),
    slow("--config.model.patch_size=3", "patch"),
    ("--config.init_from={folder}/weights.pth", "pickle.*never loaded"),
    slow("--config.init_from={folder}/none.safetensors", "is not a file"),
  ],
)
def test_wrong_training_input(options, message, folder, tmp_path):
  (folder / "weights.pth").write_bytes(b"PK\x03\x04" + bytes(50))
  line = commands.last_error(
    f"main --config={LATENT} --workdir={tmp_path}/run"
    f" --data_dir={folder}/data {options.format(folder=folder)}"
  )
  assert re.search(message, line), line
  assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.slow
def test_guidance_on_a_model_without_label_dropout(folder, tmp_path):
  run = (
    f"main --config={LATENT} --workdir={tmp_path}/run --data_dir={folder}/data"
    " --config.diffusion.label_drop_prob=0 --config.total_steps=1"
  )
  message = "needs a model trained with label dropout"
  assert message in commands.last_error(run)
  assert not (tmp_path / "run").exists()
  commands.succeed(f"{run} --config.sampler.guidance_scale=1")
  assert message in commands.last_error(
    f"sample --workdir={tmp_path}/run --out={tmp_path}/x --guidance_scale=2"
  )
