"""The page in a real browser, against the real command, on a trained run."""

import functools
import http.client
import http.server
import io
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
import urllib.parse

import numpy as np
from PIL import Image
import pytest

import commands
from web.serving import CHROMIUM, FLAGS, Server

pytestmark = [
  pytest.mark.web,
  pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs chromium"),
]
TABS = ("Samples", "Steps", "Compare", "Run")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir) -> pathlib.Path:
  """A short run of a small network on the digits."""
  folder = tmp_path_factory.mktemp("page") / "run"
  commands.succeed(
    f"main --config=configs/digits.py:debug --workdir={folder}",
    TFDS_DATA_DIR=data_dir,
  )
  return folder


@pytest.fixture(scope="module")
def server(workdir, data_dir, tmp_path_factory):
  log = tmp_path_factory.mktemp("server") / "log"
  found = Server(f"--workdir={workdir} --port=0", log, TFDS_DATA_DIR=data_dir)
  yield found
  assert found.stop() == 0
  assert "Traceback" not in found.said()


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield found
    found.close()


@pytest.fixture
def open_page(browser, server):
  """Opens the page in a tab; all that it asks for must be the server's."""
  contexts, asked, bad = [], [], []

  def open_one(address=None, width=1280):
    context = browser.new_context(viewport={"width": width, "height": 900})
    contexts.append(context)
    page = context.new_page()
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
  for context in contexts:
    context.close()
  assert not bad
  outside = re.compile(r"(?!http://127\.0\.0\.1:|data:|blob:)")
  assert not [url for url in asked if outside.match(url)]


@pytest.fixture
def page(open_page):
  return open_page()


def button(page, name: str):
  return page.get_by_role("button", name=name, exact=True)


def go_to(page, tab: str) -> None:
  page.get_by_role("tab", name=tab).click()


def sample(page, **fields) -> str:
  """Fills fields, clicks Sample, waits; returns the status."""
  for label, value in fields.items():
    page.get_by_label(label.replace("_", " "), exact=True).first.fill(value)
  clear(page)
  button(page, "Sample").click()
  return ended(page, "done: |stopped|error: ")


def open_settings(page) -> None:
  """Opens the part with solver, guidance and weights."""
  steps = page.get_by_label("Steps", exact=True)
  if not steps.is_visible():
    page.get_by_role("button", name="Solver, guidance, weights").click()
    steps.wait_for()


def clear(page) -> None:
  """Forgets what the boxes of status say, to see what comes."""
  page.evaluate(
    "document.querySelectorAll('.status p').forEach(p => p.textContent = '')"
  )


def ended(page, pattern: str) -> str:
  found = page.locator(".status p:visible", has_text=re.compile(pattern)).first
  found.wait_for()
  return found.inner_text()


def pictures(page, name: str = "samples") -> np.ndarray:
  """The pictures of a gallery as the browser got them, [n, h, w(, c)]."""
  images = page.locator(f"#{name} .thumbnail-item img")
  images.first.wait_for()
  urls = images.evaluate_all("all => all.map(image => image.src)")
  return np.stack([picture(page, url) for url in urls])


def picture(page, url: str) -> np.ndarray:
  body = page.request.get(url).body()
  return np.asarray(Image.open(io.BytesIO(body)))


def command_of(page) -> str:
  return page.locator("#command textarea").input_value()


def run_command(text: str, folder: pathlib.Path) -> pathlib.Path:
  """Runs the command line that the page shows; returns where samples lie."""
  prefix = "python -m diffit_jax."
  assert text.startswith(prefix)
  commands.succeed(text.removeprefix(prefix), cwd=folder)
  return folder / "samples"


def test_samples_and_files_are_the_bits_of_the_command(page, tmp_path):
  page.get_by_label("Classes", exact=True).first.click()
  for name in ("3", "7"):
    page.get_by_role("option", name=name, exact=True).first.click()
  page.keyboard.press("Escape")
  assert sample(page, Seed="5", Samples="6").startswith("done: 6 samples")
  seen = pictures(page)
  alts = page.locator("#samples .thumbnail-item img").evaluate_all(
    "all => all.map(image => image.alt)"
  )
  assert alts[:2] == ["sample 0, class 3", "sample 1, class 7"]
  made = run_command(command_of(page), tmp_path)
  files = sorted((made / "images").iterdir())
  assert len(files) == len(seen) == 6
  for image, file in zip(seen, files):
    np.testing.assert_array_equal(image, np.asarray(Image.open(file)))
  for name, file in (
    ("Download PNG", made / "grid.png"),
    ("Download npz", next(made.glob("*.npz"))),
  ):
    with page.expect_download() as download:
      button(page, name).click()
    assert pathlib.Path(download.value.path()).read_bytes() == file.read_bytes()
    assert download.value.suggested_filename == file.name


def test_it_compiles_once_and_is_quick_then(page):
  sample(page, Samples="16")
  begun = time.monotonic()
  sample(page, Seed="1")
  pictures(page)
  seconds = time.monotonic() - begun
  print(f"first picture of 16 digits: {seconds:.2f} s after the click")
  assert seconds < 3


def test_a_sample_opens_large_by_keyboard(page):
  sample(page)
  page.locator("#samples .thumbnail-item").nth(2).focus()
  page.keyboard.press("Enter")
  large = page.locator("#samples .preview img").first
  large.wait_for()
  assert large.bounding_box()["width"] > 250
  assert large.get_attribute("alt").startswith("sample 2, class")
  page.keyboard.press("Escape")
  large.wait_for(state="detached")


def test_steps_and_attention(page):
  sample(page)
  go_to(page, "Steps")
  page.get_by_label("Sample", exact=True).fill("2")
  times = {}
  for name, done in (
    ("Show steps", "of its evaluations"), ("Show attention", "the token in row")
  ):  # fmt: skip
    for _ in range(2):  # the first compiles
      clear(page)
      begun = time.monotonic()
      button(page, name).click()
      ended(page, done)
      times[name] = time.monotonic() - begun
  print({name: f"{seconds:.2f} s" for name, seconds in times.items()})
  assert max(times.values()) < 2
  strip = pictures(page, "strip")
  go_to(page, "Samples")
  # The last x-hat is the sample: the last step of Heun's method ends there.
  np.testing.assert_array_equal(strip[-1], pictures(page)[2])
  go_to(page, "Steps")
  clear(page)
  box = page.locator("#state img").bounding_box()
  page.locator("#state img").click(
    position={"x": box["width"] * 0.7, "y": box["height"] * 0.4}
  )
  assert "row 3, column 5" in ended(page, "row 3")
  assert "row 3, column 5" in page.locator("#weights img").get_attribute("alt")
  assert page.locator("#bias img").get_attribute("alt")


def test_two_settings_from_the_same_noise(page):
  go_to(page, "Compare")
  for scale, expected in (
    ("1.5", "mean of .* 0.000 of"), ("4", "mean of .* [1-9]")
  ):  # fmt: skip
    clear(page)
    page.get_by_label("Guidance scale (B)").fill(scale)
    button(page, "Compare").click()
    ended(page, expected)
  for name in ("compare_a", "compare_b", "difference"):
    image = page.locator(f"#{name} img")
    assert image.get_attribute("alt")
    assert picture(page, image.get_attribute("src")).any()


def test_the_run_and_what_it_writes_meanwhile(page, workdir):
  go_to(page, "Run")
  assert re.match(r"\d+ curves, 1 sample grids", ended(page, "curves,"))
  grid = next((workdir / "samples").iterdir())
  np.testing.assert_array_equal(
    pictures(page, "grids")[0][..., 0], np.asarray(Image.open(grid))
  )
  shutil.copy(grid, grid.with_name("samples_edm_00000099.png"))
  clear(page)
  button(page, "Read again").click()
  assert "2 sample grids" in ended(page, "curves,")


def test_a_run_that_goes_on_shows_its_new_checkpoints(page, workdir, data_dir):
  commands.succeed(
    f"main --config=configs/digits.py:debug --workdir={workdir}"
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


def test_two_tabs_do_not_disturb_each_other(open_page):
  pages = [open_page() for _ in range(2)]
  alone = []
  for page, seed in zip(pages, ("11", "12")):
    sample(page, Seed=seed)
    alone.append(pictures(page))
  for page in pages:
    clear(page)
  for page in pages:
    button(page, "Sample").click()
  for page, expected in zip(pages, alone):
    ended(page, "done")
    np.testing.assert_array_equal(pictures(page), expected)
  assert (alone[0] != alone[1]).any()


# Seconds from a click to the first words in a box of status, in the page.
ANSWER = """() => new Promise(resolve => {
  const box = [...document.querySelectorAll('.status')].find(
    e => e.checkVisibility());
  const begun = performance.now();
  new MutationObserver(
    () => box.querySelector('p')?.innerText &&
      resolve((performance.now() - begun) / 1000)
  ).observe(box, {childList: true, subtree: true, characterData: true});
  [...document.querySelectorAll('button')].find(
    e => e.innerText.trim() === 'Read again').click();
})"""


def slow_down(page) -> None:
  """A setting that takes a minute, in many parts."""
  open_settings(page)
  page.get_by_label("Steps", exact=True).fill("150")
  page.get_by_label("Samples", exact=True).first.fill("1000")


def test_stop_ends_one_tab_and_the_page_answers_meanwhile(open_page):
  page, other = open_page(), open_page()
  slow_down(page)
  clear(page)
  button(page, "Sample").click()
  ended(page, "compiling|sampling")
  go_to(other, "Run")
  waits = []
  for _ in range(2):
    ended(other, "curves")
    other.wait_for_timeout(700)  # until it has painted the pictures
    clear(other)
    waits.append(other.evaluate(ANSWER))
  print("answers while it samples:", *(f"{wait:.2f}" for wait in waits), "s")
  assert not page.get_by_text(re.compile("^done|^stopped")).count()
  button(page, "Stop").click()
  assert ended(page, "done|stopped") == "stopped"
  go_to(other, "Samples")
  assert sample(other, Samples="4").startswith("done")


@pytest.mark.parametrize(
  "field, value, flag",
  [("Steps", "1000001", "steps"), ("Average of the weights", "../x", "ema")],
)
def test_errors_are_those_of_the_command(page, workdir, field, value, flag):
  open_settings(page)
  page.get_by_label(field, exact=True).fill(value)
  page.keyboard.press("Enter")
  page.keyboard.press("Tab")
  clear(page)
  button(page, "Sample").click()
  told = ended(page, "error: ")
  assert told == commands.last_error(
    f"sample --workdir={workdir} --out=/tmp/never --{flag}={value}"
  )


def test_labels_texts_and_a_phone(open_page):
  page = open_page(width=390)
  sample(page)
  for tab in TABS:
    go_to(page, tab)
    page.wait_for_timeout(700)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    nameless = page.evaluate(
      """() => [...document.querySelectorAll(
        'input, textarea, select, button, img')]
        .filter(e => e.checkVisibility() && !(
          e.getAttribute('aria-label') || e.alt || e.title ||
          e.labels?.length || e.innerText?.trim()))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert not nameless, (tab, nameless)


def test_the_keyboard_alone_is_enough(page):
  page.keyboard.press("Tab")
  for _ in range(40):
    focused = page.evaluate("document.activeElement.innerText")
    if focused == "Sample":
      break
    page.keyboard.press("Tab")
  assert focused == "Sample"
  page.keyboard.press("Enter")
  ended(page, "done")


def test_a_slow_network(open_page, server):
  page = open_page()
  client = page.context.new_cdp_session(page)
  client.send(
    "Network.emulateNetworkConditions",
    {
      "offline": False,
      "latency": 400,
      "downloadThroughput": 100_000,
      "uploadThroughput": 50_000,
    },
  )
  assert sample(page, Seed="8", Samples="9").startswith("done")
  assert len(pictures(page)) == 9


@pytest.fixture
def foreign(server, tmp_path):
  """Address of a page that another server of this machine has."""
  (tmp_path / "index.html").write_text(
    f"<p>other</p><iframe src='{server.address}'></iframe>"
  )
  handler = functools.partial(QuietHandler, directory=str(tmp_path))
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
    threading.Thread(target=other.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{other.server_port}"
    other.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


def test_another_page_cannot_drive_it(browser, server, foreign):
  page = browser.new_page()
  with page.expect_response(lambda r: server.address in r.url) as framed:
    page.goto(foreign)
  assert framed.value.status == 403
  assert not page.frames[1].get_by_role("button", name="Sample").count()
  for mode in ("no-cors", "cors"):
    answer = page.evaluate(
      """([url, mode]) => fetch(url, {method: 'POST', mode, body: '{}'})
        .then(answer => answer.status, () => 'refused')""",
      [f"{server.address}/gradio_api/queue/join", mode],
    )
    assert answer == "refused"
  page.close()


@pytest.mark.parametrize(
  "path, headers, status",
  [
    ("/", {}, 200),
    ("/", {"Host": "evil.example"}, 403),
    ("/", {"Origin": "http://evil.example"}, 403),
    ("/", {"Sec-Fetch-Site": "cross-site"}, 403),
    ("/gradio_api/file=/etc/passwd", {}, 404),
    ("/gradio_api/file=%2Fetc%2Fpasswd", {}, 404),
    ("/gradio_api/file={folder}/../../etc/passwd", {}, 404),
    ("/gradio_api/file={folder}/%2e%2e/%2e%2e/etc/passwd", {}, 404),
    ("/gradio_api/file={workdir}/config.json", {}, 404),
    ("/gradio_api/file=http://127.0.0.1:1/", {}, 404),
    ("/gradio_api/proxy=http://127.0.0.1:1/", {}, 404),
    ("/gradio_api/upload", {}, 404),
    ("/static/../../../etc/passwd", {}, 404),
    ("/static/%2e%2e/%2e%2e/__init__.py", {}, 404),
    ("/gradio_api/vibe-code/", {}, 404),
    ("/monitoring", {}, 404),
  ],
)
def test_what_is_served(server, workdir, path, headers, status):
  address = urllib.parse.urlsplit(server.address)
  path = path.format(folder=tempfile.gettempdir(), workdir=workdir)
  connection = http.client.HTTPConnection(address.hostname, address.port)
  connection.request("GET", path, headers=headers)
  assert connection.getresponse().status == status


def test_damaged_and_killed(open_page, workdir, data_dir, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  found = Server(
    f"--workdir={copy} --port=0", tmp_path / "log", TFDS_DATA_DIR=data_dir
  )
  page = open_page(found.address)
  for file in (copy / "checkpoints" / "2").rglob("*"):
    if file.is_file() and file.stat().st_size > 1000:
      file.write_bytes(file.read_bytes()[:500])
  open_settings(page)
  page.get_by_label("Checkpoint", exact=True).click()
  page.get_by_role("option", name="2", exact=True).click()
  told = sample(page)
  assert told == commands.last_error(
    f"sample --workdir={copy} --out={tmp_path / 'out'} --step=2"
  )
  slow_down(page)
  page.get_by_label("Checkpoint", exact=True).click()
  page.get_by_role("option", name="newest", exact=True).click()
  button(page, "Sample").click()
  ended(page, "compiling|sampling")
  found.process.kill()
  page.get_by_text(re.compile("connection|reconnect", re.I)).first.wait_for()


def test_a_signal_ends_it_in_the_midst_of_a_batch(
  open_page, workdir, tmp_path
):
  server = Server(f"--workdir={workdir} --port=0", tmp_path / "log")
  page = open_page(server.address)
  slow_down(page)
  button(page, "Sample").click()
  ended(page, "compiling|sampling")
  begun = time.monotonic()
  assert server.stop() == 0
  assert time.monotonic() - begun < 5
  assert "Traceback" not in server.said()


def test_nothing_left_the_machine(server):
  assert server.audit.read_text() == ""
