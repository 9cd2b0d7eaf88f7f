"""The server of the page, for the browser tabs that it opened alone.

Nothing leaves the machine. Gradio's analytics, its check for a newer version,
its sharing and its proxy are off, and `guard` refuses what the page does not
ask for. Gradio serves pictures from a folder that is made for this process and
deleted at its end.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile

from diffit_jax.errors import UserError
from diffit_jax.web.guard import Guard

# Read by Gradio and by what it imports, when they are imported.
ENVIRONMENT = {
  "GRADIO_ANALYTICS_ENABLED": "False",
  "GRADIO_MCP_SERVER": "False",
  "GRADIO_SHARE": "False",
  "GRADIO_SSR_MODE": "False",
  "HF_HUB_DISABLE_TELEMETRY": "1",
  "HF_HUB_OFFLINE": "1",
}


def listen(host: str, port: int) -> socket.socket:
  """A socket at that address, on which nobody is answered yet.

  Raises:
    UserError: the address is in use, or none of this machine.
  """
  try:
    family, *_, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(address)
    found.listen()
    found.set_inheritable(False)
    return found
  except OSError as error:
    raise UserError(
      f"cannot serve on --host={host} --port={port} ({error.strerror}): choose"
      " another --port, such as 0 for any that is free"
    ) from error


def serve(studio, host: str, listener: socket.socket) -> None:
  """Serves the page of a `studio.Studio`; SIGINT or SIGTERM ends the process.

  Args:
    studio: what the page shows.
    host: --host.
    listener: socket from `listen`.
  """
  folder = tempfile.mkdtemp(prefix="diffit_jax_page_")
  os.environ |= {**ENVIRONMENT, "GRADIO_TEMP_DIR": folder}
  try:
    app, stops = _make_app(studio, host)
    _run(Guard(app, host, folder), stops, host, listener, folder)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _make_app(studio, host: str):
  """(ASGI application of the page, its `words.Stops`)."""
  import fastapi
  import gradio as gr

  from diffit_jax.web import page, words

  stops = words.Stops()
  blocks = page.build(studio, stops)
  blocks.queue(default_concurrency_limit=4)
  app = gr.mount_gradio_app(
    fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
    blocks,
    path="/",
    server_name=host,
    allowed_paths=[],
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    enable_monitoring=False,
    mcp_server=False,
    pwa=False,
    theme=page.theme(),
    css=page.CSS,
    js=page.SCRIPT,
  )
  return app, stops


def _run(app, stops, host: str, listener: socket.socket, folder: str) -> None:
  """Serves `app`; a signal stops all work, and ends the process."""
  import uvicorn

  name = f"[{host}]" if ":" in host else host
  address = f"http://{name}:{listener.getsockname()[1]}"

  class Server(uvicorn.Server):
    """Says when it serves, and ends the process after it.

    It waits for no thread then: a batch may take the device minutes.
    """

    async def startup(self, sockets=None):
      await super().startup(sockets)
      print(f"page: {address}", flush=True)

    async def shutdown(self, sockets=None):
      # It cuts the streams of events, and would tell of each.
      logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
      await super().shutdown(sockets)
      shutil.rmtree(folder, ignore_errors=True)
      sys.stdout.flush()
      os._exit(0)

    def capture_signals(self):
      return contextlib.nullcontext()  # `end` takes them

  config = uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,
    ws="none",
    timeout_graceful_shutdown=1,
  )
  server = Server(config)

  def end(*_):
    stops.set_all()
    server.should_exit = True

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, end)
  server.run(sockets=[listener])
