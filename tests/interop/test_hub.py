"""Weights on the Hugging Face Hub, by its own client, unmodified.

The Hub is `hub_server.py` on this machine. Nothing here reaches the real one.
"""

import importlib.util
import json
import os
import pathlib
import re
import sys
import time

import jax
import numpy as np
import pytest

import commands
from configs import digits
from diffit_jax import publishing
from diffit_jax.errors import UserError
from diffit_jax.generation import description, weights
from diffit_jax.interop import files, hub, push
from diffit_jax.parallel.mesh import make_mesh
import hub_server
from hub_server import Repo, sha256

CONFIG = digits.get_config("debug")
# What the client itself does.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Use 'content=:DeprecationWarning"
)
MESH = make_mesh(devices=jax.devices()[:1])
ADDRESS = "hf://ada/digits/weights.safetensors"
ENVIRONMENT = {
  "HF_TOKEN": hub_server.TOKEN,
  "HF_HUB_DISABLE_XET": "1",  # its protocol is in none of the client's Python
  "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
  """The Hub, and a client that was imported to talk to it."""
  with pytest.MonkeyPatch.context() as patch, hub_server.running() as found:
    patch.setenv("HF_ENDPOINT", found.endpoint)
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name, value in ENVIRONMENT.items():
      patch.setenv(name, value)
    before = _client_modules()
    for name in before:
      del sys.modules[name]
    yield found
    for name in _client_modules():
      del sys.modules[name]
    sys.modules.update(before)


def _client_modules() -> dict:
  names = [n for n in sys.modules if n.split(".")[0] == "huggingface_hub"]
  return {name: sys.modules[name] for name in names}


@pytest.fixture
def server(running, tmp_path, monkeypatch):
  """The Hub without repositories, and a client without a cache."""
  constants = importlib.import_module("huggingface_hub.constants")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  running.repos.clear()
  running.moved.clear()
  running.requests.clear()
  running.created.clear()
  return running


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
  """A file that `export` would write."""
  rng = np.random.default_rng(5)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    files.parameter_shapes(CONFIG),
  )
  path = tmp_path_factory.mktemp("exported") / "weights.safetensors"
  files.write_weights(path, params, CONFIG, step=7, ema="edm")
  return path


def hub_of(server, content: bytes, **more) -> Repo:
  repo = server.repos["ada/digits"] = Repo.of(weights=content)
  for name, value in more.items():
    setattr(repo, name, value)
  return repo


def test_an_address_is_read_and_written():
  found = hub.parse("hf://ada/digits/ema/a b.safetensors@refs/pr/1")
  assert found == hub.Address("ada/digits", "ema/a b.safetensors", "refs/pr/1")
  assert str(found) == "hf://ada/digits/ema/a b.safetensors@refs/pr/1"
  assert str(hub.parse(ADDRESS)) == ADDRESS


@pytest.mark.parametrize(
  "text", ["hf://a.safetensors", "hf://a/b/c.bin", "hf://a/b/c.safetensors@"]
)
def test_what_is_no_address_is_told_how_to_write_one(text):
  with pytest.raises(UserError, match="write hf://OWNER/NAME/FILE.safetensors"):
    hub.fetch(text)


def test_what_is_local_is_handed_on():
  assert hub.fetch("~a/b.safetensors") == hub.Found(
    "~a/b.safetensors", "~a/b.safetensors"
  )


def test_weights_say_which_commit_and_bytes_they_are(server, exported):
  content = exported.read_bytes()
  commit = hub_of(server, content).names["main"]
  found = weights.from_file(ADDRESS, MESH)
  local = weights.from_file(exported, MESH)
  jax.tree.map(np.testing.assert_array_equal, found.params, local.params)
  assert found.source == f"{ADDRESS}@{commit}"
  assert found.source_sha256 == sha256(content)
  assert found.about == f"from {found.source}, SHA-256 {sha256(content)}"
  guided = weights.load_guide(ADDRESS, MESH, local)
  main = description.describe(guided, 0, "random", None)["about"]
  assert main["source"] == found.source
  assert main["source_sha256"] == sha256(content)
  assert local.source_sha256 == "" and local.about == ""
  initial = files.read_initial(ADDRESS, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, initial, local.params)


def test_a_revision_is_a_branch_a_tag_or_a_commit(server):
  repo = hub_of(server, b"old")
  old = repo.names["v1"] = repo.names["main"]
  new = repo.commit({"weights.safetensors": b"new"})
  read = lambda text: pathlib.Path(hub.fetch(text).path).read_bytes()
  assert read(ADDRESS) == read(f"{ADDRESS}@{new}") == b"new"
  assert read(f"{ADDRESS}@v1") == read(f"{ADDRESS}@{old}") == b"old"
  assert hub.fetch(f"{ADDRESS}@v1").source == f"{ADDRESS}@{old}"
  # A commit that is in the cache asks the network for nothing.
  server.requests.clear()
  assert read(f"{ADDRESS}@{old}") == b"old" and not server.requests


def test_redirects_are_followed_and_the_store_sees_no_token(server):
  """A repository that was renamed, and the files' own host."""
  hub_of(server, b"content")
  server.moved["ada/old"] = "ada/digits"
  found = hub.fetch(ADDRESS.replace("digits", "old"))
  assert pathlib.Path(found.path).read_bytes() == b"content"
  assert [h for _, path, h in server.requests if "/resolve/" in path][-1][
    "authorization"
  ]
  (headers,) = server.gets()
  assert "authorization" not in {name.lower() for name in headers}


def test_a_file_in_a_folder(server):
  repo = hub_of(server, b"content")
  commit = repo.commit({"ema/a.safetensors": b"more"})
  found = hub.fetch("hf://ada/digits/ema/a.safetensors")
  assert found.source == f"hf://ada/digits/ema/a.safetensors@{commit}"


def test_a_download_that_breaks_off_goes_on_where_it_was(server, monkeypatch):
  content = np.arange(3 * 2**20, dtype=np.int64).tobytes()
  hub_of(server, content, cuts=1)
  monkeypatch.setattr(time, "sleep", lambda _: None)  # 1 s before each retry
  found = hub.fetch(ADDRESS)
  assert found.sha256 == sha256(content)
  ranges = [h.get("range", h.get("Range")) for h in server.gets()]
  assert ranges == [None, f"bytes={10 * 2**20}-"]  # written 10 MiB at a time


def said(address: str = ADDRESS) -> str:
  """What `fetch` refuses with: one sentence that names the address."""
  with pytest.raises(UserError) as error:
    hub.fetch(address)
  text = str(error.value)
  assert text.startswith("hf://") and "\n" not in text
  return text


def test_an_account_is_asked_for_where_one_is_missing(server, monkeypatch):
  hub_of(server, b"content", private=True)
  assert hub.fetch(ADDRESS).sha256 == sha256(b"content")
  monkeypatch.setenv("HF_TOKEN", "hf_wrong")
  secret = said(ADDRESS.replace("digits", "other"))
  assert "no such repository, or it is private" in secret
  assert "`hf auth login`" in secret
  server.repos["ada/digits"].gated = True
  monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
  assert "ask for access" in said(f"{ADDRESS}@other")


@pytest.mark.parametrize(
  ("address", "reason"),
  [
    ("hf://ada/none/weights.safetensors", "there is no such repository"),
    ("hf://ada/digits/none.safetensors", "no such file at this revision"),
    (f"{ADDRESS}@none", "no such branch, tag or commit"),
    ("hf://ada/a--b/weights.safetensors", "Cannot have -- or .. in repo_id"),
  ],
)
def test_what_is_not_there_is_said(server, address, reason):
  hub_of(server, b"content")
  assert reason in said(address)


def test_bytes_that_are_not_the_hubs_are_refused(server):
  repo = hub_of(server, b"content", says_hash="0" * 64)
  assert f"came damaged: its SHA-256 is {sha256(b'content')}" in said()
  repo.says_hash = ""  # and are not in the cache
  assert hub.fetch(ADDRESS).sha256 == sha256(b"content")
  blobs = pathlib.Path(hub.fetch(ADDRESS).path).resolve().parent
  assert [blob.name for blob in blobs.iterdir()] == [sha256(b"content")]


def test_a_file_that_is_cut_short_is_refused(server):
  hub_of(server, b"content", says_size=100)
  assert "file should be of size 100 but has size 7" in said()


def test_without_a_network_the_cache_serves(server, monkeypatch):
  repo = hub_of(server, b"content")
  source = hub.fetch(ADDRESS).source
  constants = importlib.import_module("huggingface_hub.constants")
  # A port that nobody listens to. The client then tries five times.
  monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
  template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  monkeypatch.setattr(time, "sleep", lambda _: None)
  assert hub.fetch(ADDRESS).source == source
  repo.commit({"other.safetensors": b"more"})
  other = "hf://ada/digits/other.safetensors"
  assert "the Hub cannot be reached" in said(other)


def test_without_the_client_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'diffit_jax\[hub\]'"):
    hub.fetch(ADDRESS)


def test_a_local_file_needs_no_client(exported, monkeypatch):
  """`tests/test_layers.py` says that nothing else imports it."""
  monkeypatch.setattr(hub, "load_client", lambda: pytest.fail("asked for"))
  assert weights.from_file(exported, MESH).source == str(exported)
  files.read_initial(exported, CONFIG)


def pushed(server, exported, **settings) -> hub.Address:
  target = push.open_target(
    "hf://ada/new/w.safetensors",
    **{"is_private": False, "is_sure": True} | settings,
  )
  loaded = weights.from_file(exported, MESH)
  return publishing.publish(target, exported, loaded, "native", None)


def test_a_push_makes_one_commit_of_file_and_card(server, exported):
  found = pushed(server, exported)
  repo = server.repos["ada/new"]
  (commit,) = [c for c in repo.commits if c == found.revision]
  assert repo.names["main"] == commit
  assert repo.messages == ["first", "w.safetensors: step 7, ema edm"]
  content = repo.commits[commit]
  assert content["w.safetensors"] == exported.read_bytes()
  card = content["README.md"].decode()
  assert card.startswith("---\nlibrary_name: diffit_jax\n")
  assert "--checkpoint=hf://ada/new/w.safetensors --out=samples" in card
  assert sha256(exported.read_bytes()) in card and "`digits-debug`" in card
  assert "Not yet measured." in card and "7 steps" in card
  again = weights.from_file(str(found), MESH)
  assert again.step == 7 and again.source == str(found)


def test_a_push_replaces_its_own_card_and_no_other(server, exported):
  pushed(server, exported)
  repo = server.repos["ada/new"]
  head = lambda: repo.commits[repo.names["main"]]["README.md"]
  repo.commit({"README.md": head() + b"more"})
  pushed(server, exported)
  assert not head().endswith(b"more")
  repo.commit({"README.md": b"my own"})
  pushed(server, exported)
  assert head() == b"my own"


def test_a_private_repository(server, exported):
  pushed(server, exported, is_private=True, is_sure=False)
  assert server.repos["ada/new"].private
  pushed(server, exported, is_private=True)  # there now, and private
  server.repos["ada/new"].private = False
  with pytest.raises(UserError, match="there already and public"):
    pushed(server, exported, is_private=True)


@pytest.mark.parametrize("answer", ["y", "no"])
def test_a_new_public_repository_is_asked_for(
  server, exported, monkeypatch, answer
):
  with pytest.raises(UserError, match="add --yes for that, or --private"):
    pushed(server, exported, is_sure=False)  # pytest's stdin is no terminal
  monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
  monkeypatch.setattr("builtins.input", lambda question: answer)
  if answer == "y":
    assert pushed(server, exported, is_sure=False).revision
    return
  with pytest.raises(UserError, match="nothing was pushed"):
    pushed(server, exported, is_sure=False)
  assert not server.created and not server.repos


def test_a_push_that_cannot_be_is_one_sentence(server, exported, monkeypatch):
  with pytest.raises(UserError, match="leave out @v1"):
    push.open_target(f"{ADDRESS}@v1", is_private=False, is_sure=True)
  with pytest.raises(UserError, match="does not allow this to the token"):
    target = push.open_target(
      "hf://bob/new/w.safetensors", is_private=False, is_sure=True
    )
    target.push(exported, "card", "message")
  monkeypatch.setenv("HF_TOKEN", "hf_wrong")
  with pytest.raises(UserError, match="does not accept this token"):
    pushed(server, exported)
  monkeypatch.delenv("HF_TOKEN")
  with pytest.raises(UserError, match="this needs an account"):
    pushed(server, exported)


def score_of(loaded) -> dict:
  """A card that `evaluate` would write."""
  return {
    "metrics": {"fid": 2.5},
    "not_computed": {},
    "num_samples": 50_000,
    "warnings": ["few samples"],
    "protocol": {"reference": {"source": "/home/ada/data/ffhq64"}},
    "samples": {"sampling": description.describe(loaded, 0, "random", None)},
  }


def test_a_score_stands_on_the_card_of_its_own_weights_alone(
  exported, tmp_path
):
  loaded = weights.from_file(exported, MESH)
  score = score_of(loaded)
  path = tmp_path / "card.json"
  path.write_text(json.dumps(score))
  assert publishing.find_score(str(path), None, loaded) == score
  assert publishing.find_score(None, str(tmp_path), loaded) is None
  kept = tmp_path / "evaluation/step_00000007.json"
  kept.parent.mkdir()
  kept.write_text(json.dumps(score))
  assert publishing.find_score(None, str(tmp_path), loaded) == score
  text = publishing.model_card(
    hub.parse(ADDRESS), exported, loaded, "official", score
  )
  assert "| FID-50K | 2.5 |" in text and "Warning: few samples" in text
  assert "reference `ffhq64`" in text and "/home" not in text
  assert f"--checkpoint={ADDRESS} --config=CONFIG --out=samples" in text
  score["samples"]["sampling"]["weights_sha256"] = "0" * 64
  for file in (path, kept):
    file.write_text(json.dumps(score))
  with pytest.raises(UserError, match="is of other weights"):
    publishing.find_score(str(path), None, loaded)
  assert publishing.find_score(None, str(tmp_path), loaded) is None


def test_the_commands(server, exported, tmp_path):
  """`export` from one repository to another, and what the file then says."""
  commit = hub_of(server, exported.read_bytes()).names["main"]
  env = {
    **{name: os.environ[name] for name in ("HF_ENDPOINT", "HF_TOKEN")},
    "HF_HUB_DISABLE_XET": "1",
    "HF_HOME": str(tmp_path / "home"),
  }
  word = f"export --checkpoint={ADDRESS} --push=hf://ada/copy/w.safetensors"
  refused = commands.last_error(word, **env)
  assert "ada/copy is not there yet" in refused
  out = commands.succeed(f"{word} --yes", **env)
  source = f"{ADDRESS}@{commit}"
  assert source in out
  found = hub.fetch(re.search(r"^pushed: (hf://.+@\w{40})$", out, re.M)[1])
  assert source in files.native.load(found.path)[1]["about"]
  assert "--private goes with --push" in commands.last_error(
    f"export --checkpoint={ADDRESS} --out={tmp_path}/a.safetensors --private"
  )
