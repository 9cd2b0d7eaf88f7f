"""The README's commands in their debug form, and what users get wrong."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

import commands
from diffit_jax import cli
from diffit_jax.errors import UserError
from diffit_jax.parallel import cluster
import tensorboard_files

DEBUG = "--config=configs/digits.py:debug"


@pytest.fixture(scope="module")
def workdir(digits_run):
  return digits_run


@pytest.mark.slow
def test_a_trace_is_written_beside_the_run(workdir):
  (trace,) = workdir.rglob("*.xplane.pb")
  plugins, profile, _, _ = trace.relative_to(workdir).parts  # what XProf wants
  assert (plugins, profile) == ("plugins", "profile")
  assert trace.stat().st_size > 1000
  assert not re.search(rb"\$\w+\.py:\d+", trace.read_bytes())  # Python's calls


def test_training_writes_what_it_says(workdir):
  assert json.loads((workdir / "config.json").read_text())["batch_size"] == 16
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [
    "2",
    "4",
  ]
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
  grid = Image.open(workdir / "samples" / "samples_edm_00000004.png")
  assert min(grid.size) > 100


def test_tensorboard_holds_the_metrics(workdir):
  found = tensorboard_files.read(workdir / "tensorboard")
  scalars = {tag for tag, plugin in found if plugin == "scalars"}
  assert scalars >= {
      "loss", "learning_rate", "grad_norm", "param_norm", "ema_decay/edm",
      "images_per_second", "seconds_per_step",
  }  # fmt: skip
  assert [step for step, _ in found["loss", "scalars"]] == [2, 4]
  ((step, (width, height, png)),) = found["samples_edm", "images"]
  grid = workdir / "samples" / "samples_edm_00000004.png"
  assert step == 4 and png == grid.read_bytes()
  assert Image.open(grid).size == (int(width), int(height))


@pytest.mark.slow
def test_sample_export_and_sample_again(workdir, tmp_path):
  out = commands.succeed(
    f"sample --workdir={workdir} --out={tmp_path}/a --num=6 --seed=3"
    " --labels=0-9 --steps=2"
  )
  assert f"{tmp_path}/a/grid.png" in out
  file = tmp_path / "digits.safetensors"
  commands.succeed(f"export --workdir={workdir} --out={file}")
  commands.succeed(
    f"sample --checkpoint={file} --out={tmp_path}/b --num=6 --seed=3"
    " --labels=0-9 --steps=2"
  )
  name = "samples_6x8x8x3.npz"
  first, second = (
    np.load(tmp_path / folder / name, allow_pickle=False) for folder in "ab"
  )
  np.testing.assert_array_equal(first["arr_0"], second["arr_0"])
  assert first["arr_1"].tolist() == list(range(6))


@pytest.mark.slow
def test_raw_parameters_differ_from_the_average(workdir, tmp_path):
  for ema in ("edm", "none"):
    commands.succeed(
      f"sample --workdir={workdir} --out={tmp_path}/{ema} --num=1"
      f" --ema={ema} --steps=2"
    )
  read = lambda ema: json.loads((tmp_path / ema / "sampling.json").read_text())
  assert read("edm")["weights_sha256"] != read("none")["weights_sha256"]


def test_dry_run_needs_no_data(tmp_path):
  out = commands.succeed(
    f"main {DEBUG} --dry_run --data_dir={tmp_path}/none", TFDS_DATA_DIR=""
  )
  for text in ("parameters:          2,570", "MACs per image", "MiB state"):
    assert text in out


def test_demo_in_its_debug_form(tmp_path):
  options = f"--variant=debug --workdir={tmp_path}/runs/digits"
  first = commands.succeed(f"demo {options}", TFDS_DATA_DIR="")
  report = json.loads((tmp_path / "runs/digits/demo.json").read_text())
  assert report["num_samples"] == 500 and report["train_steps"] == 4
  assert report["recognised_real"] > 0.95
  assert os.path.exists(report["grid"])
  lines = first.strip().splitlines()
  assert re.match(r"Fréchet distance .*not FID", lines[-3])
  assert lines[-2] == f"grid: {report['grid']}"
  assert re.fullmatch(r"recognised: 0\.\d+ of 500 .*", lines[-1])
  line = commands.last_error(
    f"demo {options.replace('=debug', '=debug,window=2')}"
  )
  assert "holds another run: model.window_size is 4 there and 2 here" in line


@pytest.mark.slow
def test_demo_samples_a_finished_run_again_or_trains_anew(tmp_path):
  options = f"--variant=debug --workdir={tmp_path}/runs/digits"
  commands.succeed(f"demo {options}", TFDS_DATA_DIR="")
  assert "already trained: 4 steps" in commands.succeed(f"demo {options}")
  (tmp_path / "runs/digits/thesis.txt").write_text("not the demo's")
  commands.succeed(f"demo {options} --fresh")
  assert (tmp_path / "runs/digits/thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, least", [("digits", 0.95), ("digits_latent", 0.90)]
)
def test_demo_reaches_its_score(name, least, tmp_path):
  commands.succeed(
    f"demo --config_name={name} --workdir={tmp_path}/run",
    TFDS_DATA_DIR="",
    XLA_FLAGS="",  # a real run: optimised
  )
  report = json.loads((tmp_path / "run" / "demo.json").read_text())
  print(report)
  assert report["recognised"] >= least


def test_demo_score_is_honest():
  """Real digits score high, shuffled labels and noise like chance."""
  from sklearn import datasets

  from diffit_jax import demo

  real = datasets.load_digits()
  images = np.round(real.images[:500] * (255 / 16)).astype(np.uint8)
  images = np.repeat(images[..., None], 3, axis=-1)
  recognised, held_out = demo.score(images, real.target[:500])
  assert recognised > 0.97 and 0.97 < held_out < 1
  shifted, _ = demo.score(images, (real.target[:500] + 1) % 10)
  assert shifted < 0.03
  noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
  assert demo.score(noise, real.target[:500])[0] < 0.3


def test_demo_distance_is_honest(tmp_path):
  """Real digits are as near as real digits are, noise is far."""
  from sklearn import datasets

  from diffit_jax import demo
  from diffit_jax.parallel.mesh import make_mesh

  def distances(images):
    (tmp_path / "folder").mkdir(exist_ok=True)
    for i, image in enumerate(images):
      Image.fromarray(image).save(tmp_path / "folder" / f"{i:03d}.png")
    return demo.frechet_distances(tmp_path / "folder", make_mesh())

  real = datasets.load_digits().images[:500]
  found, between_real = distances(np.round(real * (255 / 16)).astype(np.uint8))
  assert 0 < found < 2 * between_real < 1
  noise = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
  assert distances(noise)[0] > 20 * between_real


def test_sigterm_saves_and_asks_to_be_started_again(tmp_path, data_dir):
  command = (
    f"main {DEBUG} --workdir={tmp_path}/run --data_dir={data_dir}"
    " --config.total_steps=1000000 --config.save_every_steps=1000000"
    " --config.sample_every_steps=0"
  )
  process = commands.start(command)
  events = tmp_path / "run" / "tensorboard"
  deadline = time.monotonic() + 200
  while not list(events.glob("events*")) and time.monotonic() < deadline:
    time.sleep(0.2)
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=200)
  assert process.returncode == 75, err[-3000:]
  steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
  assert len(steps) == 1
  done = f"{command} --config.total_steps={steps[0] + 1}"
  assert f"resuming at step {steps[0]}" in commands.run(done).stderr


@pytest.mark.parametrize(
  "command, message",
  [
    ("main", "--config is missing"),
    ("main --config=configs/none.py", "not found.*configs/none.py"),
    (f"main {DEBUG} --config.foo=1", "no field 'foo', only .*'batch_size'"),
    (f"main {DEBUG} --config.model.x=1", "no field 'x', only .*window_size"),
    (f"main {DEBUG} --config.batch_size=a", "batch_size=a.*invalid literal"),
    ("main --config=configs/digits.py:debg", "'debg'.*valid are window=4"),
    ("main --config=configs/cifar10.py:window=3", "use window=4|2|8"),
    (f"main {DEBUG} --data_dir=nowhere", "diffit_jax.prepare digits"),
    (f"main {DEBUG} extra", "unexpected argument 'extra'"),
    ("sample --out=x", "exactly one of --workdir=... or --checkpoint="),
    ("sample --workdir=nowhere --out=x", "nowhere holds no run"),
    ("sample --checkpoint=no.safetensors --out=x", "is not a file"),
    ("sample --checkpoint=a --out=x --num=0", "num"),
    ("export --workdir=nowhere --out=a.safetensors", "holds no run"),
    ("sample --workdir=x --out=gs://b/x", "--out=gs://b/x is no local path"),
    ("export --workdir=x --out=gs://b/x", "--out=gs://b/x is no local path"),
  ],
)
def test_wrong_input_ends_in_one_clear_line(command, message, tmp_path):
  config = f"{commands.ROOT}/configs"
  command = command.replace("=configs", f"={config}")
  line = commands.last_error(command, cwd=tmp_path)
  assert re.search(message, line), line
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sample", "export"])
def test_several_tasks_of_slurm_are_refused(command, tmp_path):
  step = {"NUM_TASKS": "2", "NODELIST": "n[1-2]", "ID": "0"}
  line = commands.last_error(
    f"{command} --workdir=x --out={tmp_path}/x",
    SLURM_JOB_ID="1",
    SLURM_PROCID="0",
    **{f"SLURM_STEP_{key}": value for key, value in step.items()},
  )
  assert "slurm starts 2 here" in line and "start it once, on one host" in line


def test_several_hosts_of_a_tpu_are_refused(monkeypatch):
  monkeypatch.setattr(cluster, "has_tpu", lambda: True)
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
  cli.require_one_process()
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
  with pytest.raises(UserError, match="tpu starts 4 here.* once, on one host"):
    cli.require_one_process()


def test_wrong_sampling_input(workdir, tmp_path):
  for options, message in (
    ("--labels=12", "beyond the model's classes 0..9"),
    ("--solver=rk4", "solver 'rk4' is unknown; allowed: edm_heun"),
    ("--solver=euler", "not for a model of diffusion.kind='edm': use edm_heun"),
    ("--step=3", r"has no checkpoint of step 3, only \[\d"),
    ("--guide=x", "--guide goes with --guide_scale"),
    ("--guide_scale=2", "guide_scale goes with --guide"),
    (f"--guide={workdir} --guide_step=3 --guide_scale=2", "no checkpoint of"),
    ("--steps=0", "steps=0"),
    ("--ema=swa", r"ema='swa': this run has \['edm'\]"),
  ):
    line = commands.last_error(
      f"sample --workdir={workdir} --out={tmp_path}/x {options}"
    )
    assert re.search(message, line), line
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, data_dir):
  """A limit on file sizes stands for the disk: writes fail from then on."""
  common = (
    f"{DEBUG} --workdir={tmp_path}/run --data_dir={data_dir}"
    " --config.sample_every_steps=0 --config.keep_checkpoints=9"
  )
  commands.succeed(f"main {common} --config.total_steps=2")
  script = tmp_path / "limited.py"
  script.write_text(
    "import resource, runpy, signal, sys\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    "sys.argv = ['main', *sys.argv[1:]]\n"
    "runpy.run_module('diffit_jax.main', run_name='__main__')\n"
  )
  done = subprocess.run(
    [sys.executable, str(script), *common.split()],
    cwd=commands.ROOT,
    env={**os.environ, "XLA_FLAGS": commands.FAST_COMPILE},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 1, done.stderr[-3000:]
  line = done.stderr.strip().splitlines()[-1]
  assert re.search("error: saving .*checkpoint.* failed.*older", line), line
  path = pathlib.Path(tmp_path) / "run" / "checkpoints"
  assert [p.name for p in path.iterdir() if p.name.isdigit()] == ["2"]
  err = commands.run(f"main {common}").stderr
  assert "resuming at step 2" in err
