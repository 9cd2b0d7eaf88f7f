"""The command itself: what it refuses, how it ends, who imports it."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

import commands
from diffit_jax.web import guard as guard_lib
from web.serving import Server

pytestmark = pytest.mark.web


def test_it_says_what_is_missing_or_wrong():
  assert "--workdir=... or --checkpoint=..." in commands.last_error("explore")
  assert "/no/such" in commands.last_error(
    "explore --workdir=/no/such --port=0"
  )
  assert "leave it out" in commands.last_error("explore --workdir=x --step=3")


def test_a_port_in_use_is_one_sentence():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    told = commands.last_error(f"explore --workdir=x --port={port}")
  assert f"cannot serve on --host=127.0.0.1 --port={port}" in told


def test_without_gradio_it_says_how_to_get_it(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(
    "import importlib.util as u\n"
    "find = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name == 'gradio' else find(name)\n"
  )
  told = commands.last_error("explore --workdir=x", PYTHONPATH=str(tmp_path))
  assert told == (
    "error: this page needs Gradio: pip install 'diffit_jax[web]'"
  )


def test_interrupt_ends_it_and_leaves_nothing(short_run, tmp_path):
  server = Server(f"--workdir={short_run} --port=0", tmp_path / "log",
                  TMPDIR=str(tmp_path))  # fmt: skip
  assert server.address
  assert list(tmp_path.glob("diffit_jax_page_*"))
  assert server.stop(signal.SIGINT) == 0
  assert re.fullmatch(r"page: http://127\.0\.0\.1:\d+\n", server.said())
  assert not list(tmp_path.glob("diffit_jax_page_*"))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, data_dir):
  """A run of two steps."""
  folder = tmp_path_factory.mktemp("signals") / "run"
  commands.succeed(
    f"main --config=configs/digits.py:debug --workdir={folder}"
    " --config.total_steps=2",
    TFDS_DATA_DIR=data_dir,
  )
  return folder


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


def test_nothing_else_imports_the_page():
  users = [
    str(path.relative_to(commands.ROOT))
    for folder in ("diffit_jax", "configs", "benchmarks")
    for path in (commands.ROOT / folder).rglob("*.py")
    if re.search(r"import gradio|diffit_jax\.web|from diffit_jax import .*web",
                 path.read_text())  # fmt: skip
  ]
  assert {os.path.dirname(user) for user in users} == {
    "diffit_jax", "diffit_jax/web"
  }  # fmt: skip
  assert [user for user in users if "web/" not in user] == [
    "diffit_jax/explore.py"
  ]


def test_the_command_needs_nothing_heavy_to_be_imported():
  code = (
    "import sys, diffit_jax.explore;"
    "print([m for m in ('jax', 'gradio', 'fastapi') if m in sys.modules])"
  )
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=commands.ROOT, capture_output=True,
    text=True, check=True,
  )  # fmt: skip
  assert found.stdout.strip() == "[]"
