"""What the tests do in the browser: fill, click, wait, and look."""

import io
import os
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

import commands
from web.serving import CHROMIUM

IN_BROWSER = [
  pytest.mark.web,
  pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="needs chromium"),
]
TABS = ("Samples", "Steps", "Compare", "Run")


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
    # What is filled in before the boxes are painted is lost.
    page.evaluate(
      """() => new Promise(done => requestAnimationFrame(
        () => requestAnimationFrame(done)))"""
    )


def choose(page, label: str, option: str) -> None:
  """Chooses from a dropdown."""
  page.get_by_label(label, exact=True).click()
  page.get_by_role("option", name=option, exact=True).click()


def slow_down(page) -> None:
  """A setting that takes a minute, in many parts."""
  open_settings(page)
  page.get_by_label("Steps", exact=True).fill("150")
  page.get_by_label("Samples", exact=True).first.fill("1000")


def begin_to_sample(page) -> None:
  clear(page)
  button(page, "Sample").click()
  ended(page, "compiling|sampling")


def clear(page) -> None:
  """Forgets what the boxes of status say, to see what comes."""
  page.evaluate(
    "document.querySelectorAll('.status p').forEach(p => p.textContent = '')"
  )


def ended(page, pattern: str) -> str:
  """What the box of status says, once it is of that pattern."""
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
  """The command line that the page shows, without `python -m diffit_jax.`."""
  text = page.locator("#command textarea").input_value()
  prefix = "python -m diffit_jax."
  assert text.startswith(prefix)
  return text.removeprefix(prefix)


def run_command(page, folder: pathlib.Path) -> pathlib.Path:
  """Runs the command line that the page shows; returns where samples lie."""
  commands.succeed(command_of(page), cwd=folder)
  return folder / "samples"


def check_samples(page, made: pathlib.Path) -> None:
  """The pictures on show have the bits of the files of `sample`."""
  seen = pictures(page)
  files = sorted((made / "images").iterdir())
  assert len(files) == len(seen)
  for image, file in zip(seen, files):
    np.testing.assert_array_equal(image, np.asarray(Image.open(file)))
