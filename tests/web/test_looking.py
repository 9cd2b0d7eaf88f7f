"""A look inside in the browser: steps, attention, two settings compared."""

import time

import numpy as np

from web.driving import (
  IN_BROWSER,
  button,
  clear,
  ended,
  go_to,
  picture,
  pictures,
  sample,
)

pytestmark = IN_BROWSER


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
