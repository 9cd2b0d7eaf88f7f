"""One run for all tests of the page; a server and a browser for each worker."""

import pathlib
import re

import pytest

from web.driving import button
from web.serving import CHROMIUM, FLAGS, Server


@pytest.fixture(scope="session")
def workdir(digits_run) -> pathlib.Path:
  """A short run of a small network on the digits; to be read."""
  return digits_run


@pytest.fixture(scope="session")
def server(workdir, data_dir, tmp_path_factory):
  """The page of `workdir`."""
  log = tmp_path_factory.mktemp("server") / "log"
  arguments = f"--workdir={workdir} --port=0"
  with Server(arguments, log, TFDS_DATA_DIR=data_dir) as found:
    yield found


@pytest.fixture(scope="session")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield found
    found.close()


@pytest.fixture(scope="session")
def context(browser):
  """One for all pages: the scripts of the page are loaded once."""
  return browser.new_context()


@pytest.fixture
def open_page(context, server):
  """Opens the page in a tab; all that it asks for must be the server's."""
  pages, asked, bad = [], [], []

  def open_one(address=None, width=1280, scheme="light"):
    pages.append(page := context.new_page())
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on(
      "response",
      lambda answer: answer.status >= 400 and bad.append(answer.url),
    )
    page.goto(address or server.address)
    button(page, "Sample").wait_for()
    return page

  yield open_one
  for page in pages:
    page.close()
  assert asked or not pages
  assert not bad
  outside = re.compile(r"(?!http://127\.0\.0\.1:|data:|blob:)")
  assert not [url for url in asked if outside.match(url)]


@pytest.fixture
def page(open_page):
  return open_page()
