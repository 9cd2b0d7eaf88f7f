"""Who may ask the server, and for what.

What another page may try is refused:

  another name for this address (DNS rebinding)   Host is none of ours
  a request from a page of another origin         Origin, Sec-Fetch-Site
  a frame around this page                        frame-ancestors 'none'
  files of this machine, addresses elsewhere      paths that are not listed

The Content-Security-Policy lets the browser ask nobody but this server.
"""

import ipaddress
import os
import socket
from urllib.parse import unquote

# Gradio writes its scripts and styles into the page and makes pictures of data.
POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
  " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
  " font-src 'self' data:; worker-src 'self' blob:; object-src 'none';"
  " base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
  "content-security-policy": POLICY,
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cross-origin-resource-policy": "same-origin",
}
_FILES = "/gradio_api/file="
_EXACT = {
  "/",
  "/config",
  "/favicon.ico",
  "/manifest.json",
  "/theme.css",
  "/gradio_api/cancel",
  "/gradio_api/info",
  "/gradio_api/queue/data",
  "/gradio_api/queue/join",
  "/gradio_api/reset",
  "/gradio_api/startup-events",
}
_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")


class Guard:
  """ASGI middleware that refuses what is not asked by this page itself."""

  def __init__(self, app, host: str, folder: str):
    """
    Args:
      app: the ASGI application behind.
      host: --host, the address that is served.
      folder: the one folder of which files are served.
    """
    self._app, self._folder = app, os.path.realpath(folder)
    self._is_open = not is_loopback(host)
    self._names = {host.lower(), "localhost", "127.0.0.1", "::1"}
    if self._is_open:
      self._names.add(socket.gethostname().lower())

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    headers = {
      key.decode("latin-1"): value.decode("latin-1")
      for key, value in scope["headers"]
    }
    if reason := self.refusal(headers):
      return await _answer(send, 403, reason)
    if not self.is_served(scope["path"]):
      return await _answer(send, 404, "there is no such page here")

    async def send_with_headers(message):
      if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *_encoded(HEADERS)]
      await send(message)

    await self._app(scope, receive, send_with_headers)

  def refusal(self, headers: dict[str, str]) -> str | None:
    """Why a request with these headers is refused, or None."""
    address = headers.get("host", "").lower()
    if not self._is_ours(_name_of(address)):
      return f"this server is not called {address!r}"
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (
      f"http://{address}",
      f"https://{address}",
    ):
      return "a page of another origin cannot use this one"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
      return "a page of another site cannot use this one"
    return None

  def is_served(self, path: str) -> bool:
    """Whether a path is one that the page itself asks for."""
    if path.startswith(_FILES):
      # Gradio decodes again what it takes for a path.
      file = unquote(path.removeprefix(_FILES))
      return os.path.realpath(file).startswith(self._folder + os.sep)
    return (
      path.rstrip("/") in _EXACT
      or path in _EXACT
      or (path.startswith(_BELOW) and ".." not in unquote(path))
    )

  def _is_ours(self, name: str) -> bool:
    """A name of this server; behind an open address, also any IP address.

    Rebinding gives a name of the attacker to our address, never a number.
    """
    if name in self._names:
      return True
    return self._is_open and _is_number(name)


def is_loopback(host: str) -> bool:
  """Whether an address is reached from this machine alone."""
  return host == "localhost" or (
    _is_number(host) and ipaddress.ip_address(host).is_loopback
  )


def _is_number(name: str) -> bool:
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return False
  return True


def _name_of(address: str) -> str:
  """The name in a Host header: without port and brackets."""
  if address.startswith("["):
    return address[1:].partition("]")[0]
  return address.rpartition(":")[0] or address


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
  return [(key.encode(), value.encode()) for key, value in headers.items()]


async def _answer(send, status: int, text: str) -> None:
  """Sends a short plain text."""
  headers = {"content-type": "text/plain; charset=utf-8", **HEADERS}
  await send(
    {
      "type": "http.response.start",
      "status": status,
      "headers": _encoded(headers),
    }
  )
  await send({"type": "http.response.body", "body": f"{text}\n".encode()})
