"""A small Hugging Face Hub on this machine, which the real client talks to.

It serves what `huggingface_hub` asks for when it downloads one file and when it
makes one commit: with the status codes, headers and redirects of the real one.
"""

import base64
import contextlib
import dataclasses
import hashlib
from http import server
import json
import re
import threading
from urllib import parse

TOKEN = "hf_of_the_tests"


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@dataclasses.dataclass
class Repo:
  """One repository.

  Attributes:
    commits: {commit: {file: content}}, the newest last.
    names: {branch or tag: commit}.
    private: whether it needs the token.
    gated: whether its authors did not let this account in.
    says_hash: what the Hub says in place of a file's hash.
    says_size: what it says in place of a file's size.
    cuts: how many times a download breaks off in the middle.
    messages: of the commits that were pushed.
  """

  commits: dict[str, dict[str, bytes]]
  names: dict[str, str]
  private: bool = False
  gated: bool = False
  says_hash: str = ""
  says_size: int = 0
  cuts: int = 0
  messages: list[str] = dataclasses.field(default_factory=list)

  @classmethod
  def of(cls, **files: bytes) -> "Repo":
    """A repository of one commit; `weights=..` is weights.safetensors."""
    repo = cls({}, {})
    repo.commit({f"{name}.safetensors": x for name, x in files.items()})
    return repo

  def commit(self, files: dict[str, bytes], message: str = "first") -> str:
    """Adds files to the branch main; returns the commit's hash."""
    old = self.commits.get(self.names.get("main"), {})
    new = hashlib.sha1(f"{len(self.commits)}{id(self)}".encode()).hexdigest()
    self.commits[new], self.names["main"] = {**old, **files}, new
    self.messages.append(message)
    return new


class Hub(server.ThreadingHTTPServer):
  """The server.

  Attributes:
    repos: {OWNER/NAME: repository}.
    moved: {old OWNER/NAME: new one}.
    blobs: {SHA-256: content}: what the store at another host has.
    requests: [(method, path, headers)] so far.
    created: [payload] of the repositories that were asked for.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.repos: dict[str, Repo] = {}
    self.moved: dict[str, str] = {}
    self.blobs: dict[str, bytes] = {}
    self.requests: list[tuple] = []
    self.created: list[dict] = []
    self.endpoint = f"http://127.0.0.1:{self.server_port}"
    # The store is another host, which must not see the token.
    self.store = f"http://localhost:{self.server_port}/store"

  def gets(self, of: str = "/store/") -> list[dict]:
    """Headers of the downloads so far."""
    return [h for m, path, h in self.requests if m == "GET" and of in path]


@contextlib.contextmanager
def running():
  """The hub while it serves."""
  with Hub() as hub:
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield hub
    finally:
      hub.shutdown()
      thread.join()


class Handler(server.BaseHTTPRequestHandler):
  """Answers one request; the routes are tried from the top."""

  protocol_version = "HTTP/1.1"
  server: Hub

  def do_HEAD(self):  # noqa: N802
    self._route("HEAD")

  def do_GET(self):  # noqa: N802
    self._route("GET")

  def do_POST(self):  # noqa: N802
    self._route("POST")

  def do_PUT(self):  # noqa: N802
    self._route("PUT")

  def log_message(self, *_):
    pass

  def _route(self, method: str) -> None:
    length = int(self.headers.get("Content-Length") or 0)
    self._body = self.rfile.read(length)
    path = parse.unquote(self.path)
    self.server.requests.append((method, path, dict(self.headers)))
    for pattern, do in (
      (r"/store/(\w+)", self._put if method == "PUT" else self._blob),
      (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
      (r"/api/whoami-v2", self._whoami),
      (r"/api/validate-yaml", self._validate),
      (r"/api/repos/create", self._create),
      (r"/api/models/([^/]+/[^/]+)", self._info),
      (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
      (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
      (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
    ):
      if match := re.fullmatch(pattern, path):
        return do(*match.groups())
    return self._error(404, "NoSuchRoute")

  def _answer(self, status: int, content: bytes = b"", **headers) -> None:
    self.send_response(status)
    for name, value in {"Content-Length": len(content), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _json(self, content, status: int = 200) -> None:
    text = json.dumps(content).encode()
    self._answer(status, text, Content_Type="application/json")

  def _error(self, status: int, code: str = "", **headers) -> None:
    self._answer(status, X_Error_Code=code, X_Error_Message=code, **headers)

  def _has_token(self) -> bool:
    return self.headers.get("Authorization") == f"Bearer {TOKEN}"

  def _repo(self, name: str) -> Repo | None:
    """The repository, or None after an answer that says why not."""
    repo = self.server.repos.get(name)
    if repo is None or repo.private and not self._has_token():
      # As the real one: only an account is told that there is none.
      self._error(404 if self._has_token() else 401, "RepoNotFound")
      return None
    if repo.gated:
      self._error(403, "GatedRepo")
      return None
    return repo

  def _resolve(self, name: str, revision: str, file: str) -> None:
    if name in self.server.moved:
      new = self.server.moved[name]
      return self._answer(307, Location=f"/{new}/resolve/{revision}/{file}")
    if (repo := self._repo(name)) is None:
      return None
    commit = repo.names.get(revision, revision)
    if commit not in repo.commits:
      return self._error(404, "RevisionNotFound")
    if file not in repo.commits[commit]:
      return self._error(404, "EntryNotFound", X_Repo_Commit=commit)
    content = repo.commits[commit][file]
    if not file.endswith(".safetensors"):
      etag = f'"{hashlib.sha1(content).hexdigest()}"'
      return self._answer(200, content, ETag=etag, X_Repo_Commit=commit)
    self.server.blobs[sha256(content)] = content
    said = repo.says_hash or sha256(content)
    return self._answer(
      302,
      Location=f"{self.server.store}/{sha256(content)}",
      X_Repo_Commit=commit,
      X_Linked_Etag=f'"{said}"',
      X_Linked_Size=repo.says_size or len(content),
    )

  def _blob(self, digest: str) -> None:
    content, start = self.server.blobs[digest], 0
    if asked := self.headers.get("Range"):
      start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
    rest = content[start:]
    repos = self.server.repos.values()
    if cut := next((repo for repo in repos if repo.cuts), None):
      cut.cuts -= 1
      self.send_response(206 if asked else 200)
      self.send_header("Content-Length", str(len(rest)))
      self.end_headers()
      self.wfile.write(rest[: len(rest) // 2])
      self.close_connection = True
      return None
    return self._answer(206 if asked else 200, rest)

  def _whoami(self) -> None:
    if not self._has_token():
      return self._error(401)
    return self._json({"name": "ada", "type": "user"})

  def _validate(self) -> None:
    self._json({"errors": [], "warnings": []})

  def _create(self) -> None:
    asked = json.loads(self._body)
    self.server.created.append(asked)
    if asked["organization"] != "ada":
      return self._error(403)
    name = f"{asked['organization']}/{asked['name']}"
    is_private = asked.get("private") or asked.get("visibility") == "private"
    repo = Repo({}, {}, private=bool(is_private))
    repo.commit({".gitattributes": b""})
    self.server.repos[name] = repo
    return self._json({"url": f"{self.server.endpoint}/{name}"})

  def _info(self, name: str) -> None:
    if repo := self._repo(name):
      self._json(
        {"id": name, "private": repo.private, "sha": repo.names["main"]}
      )

  def _preupload(self, name: str) -> None:
    if self._repo(name):
      mode = lambda path: "lfs" if path.endswith("safetensors") else "regular"
      files = [file["path"] for file in json.loads(self._body)["files"]]
      self._json(
        {
          "files": [
            {"path": path, "uploadMode": mode(path), "shouldIgnore": False}
            for path in files
          ]
        }
      )

  def _batch(self, name: str) -> None:
    asked = json.loads(self._body)["objects"]
    where = lambda oid: {"upload": {"href": f"{self.server.store}/{oid}"}}
    self._json(
      {"objects": [{**each, "actions": where(each["oid"])} for each in asked]}
    )

  def _put(self, digest: str) -> None:
    assert sha256(self._body) == digest
    self.server.blobs[digest] = self._body
    self._answer(200)

  def _commit(self, name: str) -> None:
    if not (repo := self._repo(name)):
      return
    lines = [json.loads(line) for line in self._body.splitlines()]
    files = {}
    for line in lines[1:]:
      value = line["value"]
      files[value["path"]] = (
        base64.b64decode(value["content"])
        if line["key"] == "file"
        else self.server.blobs[value["oid"]]
      )
    new = repo.commit(files, lines[0]["value"]["summary"])
    url = f"{self.server.endpoint}/{name}/commit/{new}"
    self._json({"commitUrl": url, "commitOid": new})
