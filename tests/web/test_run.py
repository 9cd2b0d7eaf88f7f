"""A run that goes on, loses a checkpoint, and a server that is killed."""

import re
import shutil

import numpy as np
from PIL import Image
import pytest

import commands
from web.driving import (
  IN_BROWSER,
  begin_to_sample,
  button,
  choose,
  clear,
  command_of,
  ended,
  go_to,
  open_settings,
  pictures,
  sample,
  slow_down,
)
from web.serving import Server

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def copy(workdir, tmp_path_factory):
  """The run, to be changed; each test adds to what the ones before did."""
  folder = tmp_path_factory.mktemp("changed") / "run"
  shutil.copytree(workdir, folder)
  return folder


@pytest.fixture(scope="module")
def changing(copy, data_dir, tmp_path_factory):
  """A server of that run."""
  log = tmp_path_factory.mktemp("server") / "log"
  arguments = f"--workdir={copy} --port=0"
  with Server(arguments, log, TFDS_DATA_DIR=data_dir) as found:
    yield found


@pytest.fixture
def page(open_page, changing):
  return open_page(changing.address)


def test_the_run_and_what_it_writes_meanwhile(page, copy):
  go_to(page, "Run")
  assert re.match(r"\d+ curves, 1 sample grids", ended(page, "curves,"))
  assert "No scores yet" in page.get_by_role("tabpanel").last.inner_text()
  assert len(pictures(page, "curves")) > 1
  grid = next((copy / "samples").iterdir())
  np.testing.assert_array_equal(
    pictures(page, "grids")[0][..., 0], np.asarray(Image.open(grid))
  )
  shutil.copy(grid, grid.with_name("samples_edm_00000099.png"))
  for _ in range(2):  # at the second time nothing has changed
    clear(page)
    button(page, "Read again").click()
    assert "2 sample grids" in ended(page, "curves,")
    assert len(pictures(page, "grids")) == 2


def test_a_run_that_goes_on_shows_its_new_checkpoints(page, copy, data_dir):
  commands.succeed(
    f"main --config=configs/digits.py:debug --workdir={copy}"
    " --config.total_steps=6",
    TFDS_DATA_DIR=data_dir,
  )
  open_settings(page)
  box = page.get_by_label("Checkpoint", exact=True)
  option = page.get_by_role("option", name="6", exact=True)
  for _ in range(30):
    box.click()
    page.wait_for_timeout(500)
    if option.count():
      break
    page.get_by_role("heading").first.click()  # closes it
  option.click()
  assert sample(page).startswith("done")
  assert "--step=6" in command_of(page)


def test_damaged_and_killed(page, changing, copy, tmp_path):
  for file in (copy / "checkpoints" / "2").rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      file.write_bytes(file.read_bytes()[:500])
  open_settings(page)
  choose(page, "Checkpoint", "2")
  told = sample(page)
  assert told == commands.last_error(
    f"sample --workdir={copy} --out={tmp_path / 'out'} --step=2"
  )
  slow_down(page)
  choose(page, "Checkpoint", "newest")
  begin_to_sample(page)
  changing.process.kill()
  changing.process.wait()
  page.get_by_text(re.compile("connection|reconnect", re.I)).first.wait_for()
