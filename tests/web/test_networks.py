"""Other networks than a run of digits: a file with a guide, a latent run."""

import signal
import time

import pytest

import commands
from web.driving import (
  IN_BROWSER,
  begin_to_sample,
  button,
  check_samples,
  clear,
  command_of,
  ended,
  go_to,
  open_settings,
  picture,
  pictures,
  run_command,
  sample,
  slow_down,
)
from web.serving import Server

pytestmark = IN_BROWSER


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, data_dir):
  """A run of the same size whose attention has no time in it."""
  folder = tmp_path_factory.mktemp("plain") / "run"
  commands.succeed(
    "main --config=configs/digits.py:debug,time_in=plain"
    f" --workdir={folder} --config.total_steps=2",
    TFDS_DATA_DIR=data_dir,
  )
  return folder


@pytest.fixture(scope="module")
def file(workdir, tmp_path_factory):
  """The weights of the run in a file."""
  path = tmp_path_factory.mktemp("file") / "digits.safetensors"
  commands.succeed(f"export --workdir={workdir} --out={path}")
  return path


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, data_dir):
  folder = tmp_path_factory.mktemp("latent") / "run"
  commands.succeed(
    f"main --config=configs/digits_latent.py:debug --workdir={folder}"
    " --config.total_steps=2",
    TFDS_DATA_DIR=data_dir,
  )
  return folder


def end_in_the_midst(page, server, number) -> None:
  """A signal ends the server while a batch is made."""
  go_to(page, "Samples")
  slow_down(page)
  begin_to_sample(page)
  begun = time.monotonic()
  server.stop(number)
  assert time.monotonic() - begun < 5


def check_attention_beside(page) -> None:
  """A click in a map shows what that token reads in both networks."""
  go_to(page, "Steps")
  button(page, "Show attention").click()
  ended(page, "the token in row 0, column 0")
  page.locator("#beside img").click(position={"x": 5, "y": 100})
  ended(page, "the token in row [1-7], column 0")
  seen = {}
  for name, title in (
    ("weights", "digits-debug"), ("beside", "digits-debug-time_in=plain")
  ):  # fmt: skip
    image = page.locator(f"#{name} img")
    alt = image.get_attribute("alt")
    assert alt.startswith(f"{title}: attention of the token in row"), alt
    page.locator(f"#{name}").get_by_text(f"{title}: 0 to").wait_for()
    seen[name] = picture(page, image.get_attribute("src"))
  assert (seen["weights"] != seen["beside"]).any()


def test_a_file_with_a_guide_and_one_beside(
  open_page, file, plain_run, data_dir, tmp_path
):
  with Server(
    f"--checkpoint={file} --guide={plain_run} --beside={plain_run} --port=0",
    tmp_path / "log",
    TFDS_DATA_DIR=data_dir,
  ) as server:
    page = open_page(server.address)
    assert sample(page, Seed="3", Samples="4").startswith("done")
    assert f"--checkpoint={file}" in command_of(page)
    alone = pictures(page)
    open_settings(page)
    page.get_by_label("Autoguidance scale").fill("2.5")
    assert sample(page).startswith("done")
    assert (pictures(page) != alone).any()
    assert "--guide_scale=2.5" in command_of(page)
    assert f"--guide={plain_run}" in command_of(page)
    check_samples(page, run_command(page, tmp_path))
    check_attention_beside(page)
    go_to(page, "Run")
    page.get_by_text("use --workdir").wait_for()
    end_in_the_midst(page, server, signal.SIGTERM)


def test_a_latent_run(open_page, latent_run, data_dir, tmp_path):
  folder = tmp_path / "temporary"
  folder.mkdir()
  with Server(
    f"--workdir={latent_run} --port=0",
    tmp_path / "log",
    TFDS_DATA_DIR=data_dir,
    TMPDIR=str(folder),
  ) as server:
    page = open_page(server.address)
    assert sample(page, Seed="2", Samples="4").startswith("done")
    assert pictures(page).shape[1:3] == (8, 8)  # decoded
    check_samples(page, run_command(page, tmp_path))
    go_to(page, "Steps")
    for name, done in (
      ("Show steps", "of its evaluations"), ("Show attention", "the token in")
    ):  # fmt: skip
      clear(page)
      button(page, name).click()
      ended(page, done)
    assert page.locator("#weights img").get_attribute("alt")
    assert list(folder.glob("diffit_jax_page_*"))
    end_in_the_midst(page, server, signal.SIGINT)
  assert not list(folder.glob("diffit_jax_page_*"))


def test_one_beside_that_sees_something_else_is_refused(workdir, latent_run):
  told = commands.last_error(
    f"explore --workdir={workdir} --beside={latent_run} --port=0"
  )
  assert told == (
    f"error: --beside={latent_run} was trained with diffusion.kind='adm' and"
    " this network with 'edm': both are to be trained by the same objective"
  )
