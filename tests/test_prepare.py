"""The prepare command as users type it, and as machines kill it."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from diffit_jax.data import pipeline
from diffit_jax.errors import UserError
from slow import slow

_COMMAND = [sys.executable, "-m", "diffit_jax.prepare"]


def _run(*arguments, **env):
  return subprocess.run(
    [*_COMMAND, *map(str, arguments)],
    capture_output=True,
    text=True,
    env=os.environ | env,
    timeout=120,
  )


def _write_images(folder: pathlib.Path, num: int) -> pathlib.Path:
  rng = np.random.default_rng(0)
  folder.mkdir()
  for number in range(num):
    image = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(image).save(folder / f"{number}.png")
  return folder


def test_digits_need_no_tensorflow_and_are_made_once(tmp_path):
  absent = tmp_path / "modules" / "tensorflow.py"
  absent.parent.mkdir()
  absent.write_text("raise ImportError('not installed')\n")
  data_dir = tmp_path / "data"
  env = {"TFDS_DATA_DIR": str(data_dir), "PYTHONPATH": str(absent.parent)}
  for _ in range(2):
    done = _run("digits", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{data_dir}/digits/1.0.0\n"
  assert "is there already and stays as it is" in done.stderr
  assert pipeline.open_dataset("digits", str(data_dir)).num_images == 1797


def test_the_named_folder_is_what_the_config_asks_for(tmp_path):
  source = _write_images(tmp_path / "source", 3)
  done = _run(
      "image_folder", f"--source={source}", "--resolution=4", "--crop=adm",
      "--name=cats", "--encoding=png", f"--data_dir={tmp_path}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  dataset = pipeline.open_dataset("cats", str(tmp_path))
  assert dataset.image_shape == (4, 4, 3)
  assert dataset.metadata["settings"]["crop"] == "adm"
  assert dataset.encoding == "png"


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "NAME is missing"),
    (["imagenette"], "unknown data set 'imagenette': choose from digits, "),
    (["digits", "more"], "unexpected argument 'more'"),
    (["digits", "--crop=adm"], "digits takes no --crop"),
    (["cifar10", "--encoding=raw"], "cifar10 takes no --encoding"),
    (["digits", "--encoding=jpeg"], "--encoding"),
    (["ffhq64"], "ffhq64 needs --source=FOLDER_OR_ZIP"),
    (["image_folder", "--source=x"], "image_folder needs --resolution=SIDE"),
    (
      ["image_folder", "--source=x", "--resolution=0"],
      "--resolution=0 must be at least 1",
    ),
    (
      ["image_folder", "--source=x", "--resolution=8", "--name=../x"],
      "--name=../x must be lower-case letters",
    ),
    (
      ["image_folder", "--source=gone", "--resolution=8"],
      "--source=gone does not exist",
    ),
    (["ffhq64", "--source=x", "--max_bad_fraction=2"], "is not in 0..1"),
    (["digits", "--resolution=big"], "--resolution"),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
  done = _run(*arguments, f"--data_dir={tmp_path}")
  assert done.returncode == 1
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: ") and message in last
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.iterdir())


def _start_and_wait_in_the_middle(tmp_path, *options):
  """Starts a prepare that hangs on its last image, a pipe that we hold open.

  Returns the source, the process, and the pipe: closing it ends the reading.
  """
  source = tmp_path / "source"
  if not source.exists():
    _write_images(source, 20)
  os.mkfifo(source / "z.png")
  process = subprocess.Popen(
      [*_COMMAND, "image_folder", f"--source={source}", "--resolution=4",
       f"--data_dir={tmp_path}", *options],
      stderr=subprocess.PIPE,
      text=True,
  )  # fmt: skip
  deadline = time.monotonic() + 60
  while True:
    assert process.poll() is None and time.monotonic() < deadline
    try:  # fails until somebody reads
      pipe = os.open(source / "z.png", os.O_WRONLY | os.O_NONBLOCK)
      return source, process, pipe
    except OSError:
      time.sleep(0.05)


def _assert_whole(tmp_path, num_images):
  names = [path.name for path in (tmp_path / "image_folder").iterdir()]
  assert names == ["1.0.0"]
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == num_images == len(list(dataset.source))


def test_kill_9_leaves_nothing_that_training_would_read(tmp_path):
  source, process, pipe = _start_and_wait_in_the_middle(tmp_path)
  process.kill()
  process.communicate()
  os.close(pipe)
  assert list((tmp_path / "image_folder").glob("incomplete.*"))
  with pytest.raises(UserError, match="no prepared data set 'image_folder'"):
    pipeline.open_dataset("image_folder", str(tmp_path))
  (source / "z.png").unlink()
  arguments = (
      "image_folder", f"--source={source}", "--resolution=4",
      f"--data_dir={tmp_path}",
  )  # fmt: skip
  done = _run(*arguments)
  assert done.returncode == 0, done.stderr
  assert "removing what a killed prepare left" in done.stderr
  _assert_whole(tmp_path, 20)

  # Killed while it makes the set anew, the former one is still there.
  source, process, pipe = _start_and_wait_in_the_middle(tmp_path, "--overwrite")
  process.kill()
  process.communicate()
  os.close(pipe)
  dataset = pipeline.open_dataset("image_folder", str(tmp_path))
  assert dataset.num_images == 20
  (source / "z.png").unlink()
  assert _run(*arguments).returncode == 0
  _assert_whole(tmp_path, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_polite_stop_cleans_up(tmp_path, number):
  _, process, pipe = _start_and_wait_in_the_middle(tmp_path)
  process.send_signal(number)
  time.sleep(1.5)
  os.close(pipe)  # a read in a thread is not interrupted: let it end
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 130, stderr
  assert stderr.splitlines()[-1].startswith("error: interrupted")
  assert "Traceback" not in stderr
  assert not (tmp_path / "image_folder").exists()
