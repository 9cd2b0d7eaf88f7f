"""The command itself: what it refuses, who imports it, which Gradio it has."""

import importlib.metadata
import os
import re
import socket
import subprocess
import sys

import pytest

import commands
from web.serving import AUDIT

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


def test_gradio_is_of_this_time():
  """Where another package bounds Pillow, pip may fall back to one of 2022."""
  version = importlib.metadata.version("gradio")
  assert int(version.split(".")[0]) >= 6, version


def test_the_audit_notes_what_leaves_the_machine(tmp_path):
  log = tmp_path / "audit"
  code = (
    "import socket\n"
    "s = socket.socket(type=socket.SOCK_DGRAM)\n"  # it sends nothing
    "s.connect(('127.0.0.1', 9))\n"
    "s.connect_ex(('192.0.2.1', 9))\n"
  )
  subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "PYTHONPATH": str(AUDIT), "AUDIT_LOG": str(log)},
    check=True,
  )
  assert re.fullmatch(r"socket\.connect .*192\.0\.2\.1.*\n", log.read_text())
