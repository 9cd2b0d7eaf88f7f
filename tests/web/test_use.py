"""The page on a phone, by the keyboard, over a slow network."""

from web.driving import (
  IN_BROWSER,
  TABS,
  ended,
  go_to,
  pictures,
  sample,
)

pytestmark = IN_BROWSER


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


def test_a_slow_network(open_page):
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
  assert sample(page, Seed="8").startswith("done")
  assert len(pictures(page)) == 16
