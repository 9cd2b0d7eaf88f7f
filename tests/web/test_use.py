"""The page on a phone, in the dark, by the keyboard, over a slow network."""

import pytest

from web.driving import (
  IN_BROWSER,
  TABS,
  button,
  clear,
  ended,
  go_to,
  open_settings,
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


# The texts in sight with less contrast to their ground than 4.5 to 1 (WCAG 2
# AA), as [contrast, text].
FAINT = """() => {
  const numbers = color => color.match(/[0-9.]+/g).map(Number);
  const light = color => numbers(color).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    const color = e && getComputedStyle(e).backgroundColor;
    if (!e) return 'rgb(255, 255, 255)';
    return (numbers(color)[3] ?? 1) > 0.5 ? color : ground(e.parentElement);
  };
  const contrast = e => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const own = e => ['INPUT', 'TEXTAREA'].includes(e.tagName) ? e.value :
    [...e.childNodes].filter(n => n.nodeType === 3)
    .map(n => n.textContent.trim()).join('');
  return [...document.body.querySelectorAll('*')]
    .filter(e => e.checkVisibility({visibilityProperty: true}) && own(e))
    .filter(e => !['STYLE', 'SCRIPT', 'PROGRESS'].includes(e.tagName))
    .filter(e => !e.closest('button:disabled, .sr-only'))
    .map(e => [contrast(e).toFixed(1), own(e)])
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(open_page, scheme):
  page = open_page(scheme=scheme)
  ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
  assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
  open_settings(page)
  page.get_by_label("Average of the weights", exact=True).fill("../x")
  page.keyboard.press("Tab")
  clear(page)
  button(page, "Sample").click()
  ended(page, "error: ")
  for tab in TABS:
    go_to(page, tab)
    page.wait_for_timeout(500)
    assert not page.evaluate(FAINT), tab
