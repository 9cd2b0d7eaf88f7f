"""Who may use the page, and what it serves: no other page, no other file."""

import functools
import http.client
import http.server
import tempfile
import threading
import urllib.parse

import pytest

from diffit_jax.web import guard as guard_lib
from web.driving import IN_BROWSER

pytestmark = IN_BROWSER


@pytest.mark.parametrize(
  "host, headers, is_refused",
  [
    ("127.0.0.1", {"host": "127.0.0.1:7860"}, False),
    ("127.0.0.1", {"host": "localhost:9000"}, False),  # through a tunnel
    ("127.0.0.1", {"host": "evil.example:7860"}, True),
    ("127.0.0.1", {"host": "10.0.0.1:7860"}, True),
    ("127.0.0.1", {}, True),
    ("0.0.0.0", {"host": "10.0.0.1:7860"}, False),
    ("0.0.0.0", {"host": "[fe80::1]:7860"}, False),
    ("0.0.0.0", {"host": "evil.example"}, True),
    ("::1", {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, False),
    ("localhost", {"host": "a:1", "origin": "http://a:1"}, True),
    ("localhost", {"host": "localhost:1", "origin": "null"}, True),
    ("::1", {"host": "[::1]:1", "origin": "http://[::1]:2"}, True),
    ("localhost", {"host": "localhost", "sec-fetch-site": "same-site"}, True),
    ("localhost", {"host": "localhost", "sec-fetch-site": "none"}, False),
  ],
)
def test_who_is_answered(host, headers, is_refused, tmp_path):
  guard = guard_lib.Guard(None, host, str(tmp_path))
  assert bool(guard.refusal(headers)) == is_refused


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
