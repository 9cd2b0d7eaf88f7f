"""Files on the Hugging Face Hub, by address.

  hf://OWNER/NAME/FILE.safetensors[@REVISION]

REVISION is a branch, a tag or a commit; without one it is the branch main. The
Hub's own client, huggingface_hub, downloads the file to its cache (HF_HOME) and
finds the token of `hf auth login` or HF_TOKEN. It is imported only for such an
address, so that nothing else asks the network for anything.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import re
import types

from diffit_jax.errors import UserError

_SCHEME = "hf://"
_ADDRESS = re.compile(
  r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<file>[^@]+\.safetensors)(@(?P<revision>.+))?"
)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

# Errors of the client by name, the narrower first, and what they mean.
_MEANINGS = {
  "GatedRepoError": "its authors decide who may have it: ask for access on the"
  f" repository's page, then {_LOG_IN}",
  "RepositoryNotFoundError": "there is no such repository, or it is private:"
  f" check its name, and {_LOG_IN}",
  "RevisionNotFoundError": "the repository has no such branch, tag or commit",
  "LocalEntryNotFoundError": "the Hub cannot be reached, and the file is not in"
  " the cache: check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
  "EntryNotFoundError": "the repository has no such file at this revision",
  "LocalTokenNotFoundError": f"this needs an account: {_LOG_IN}",
  "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and this needs the network",
}
_REFUSED = {
  401: f"the Hub does not accept this token: {_LOG_IN}",
  403: "the Hub does not allow this to the token: use one with the right to it",
}


@dataclasses.dataclass(frozen=True)
class Address:
  """Where a file is.

  Attributes:
    repo: OWNER/NAME.
    file: path of the file in the repository.
    revision: a branch, a tag or a commit; None is the branch main.
  """

  repo: str
  file: str
  revision: str | None = None

  def __str__(self) -> str:
    revision = f"@{self.revision}" if self.revision else ""
    return f"{_SCHEME}{self.repo}/{self.file}{revision}"


@dataclasses.dataclass(frozen=True)
class Found:
  """A file on this machine's disk.

  Attributes:
    path: where it is.
    source: where it came from: an address with its commit, or the path itself.
    sha256: SHA-256 of a file of the Hub, in hexadecimal; "" for others.
  """

  path: str | os.PathLike
  source: str
  sha256: str = ""


def is_address(path: str | os.PathLike) -> bool:
  """Whether a path means a file on the Hub."""
  return str(path).startswith(_SCHEME)


def parse(text: str) -> Address:
  """The address that a text says.

  Raises:
    UserError: it says none; the message shows how to write one.
  """
  match = _ADDRESS.fullmatch(text)
  if not match:
    raise UserError(
      f"{text}: write hf://OWNER/NAME/FILE.safetensors, with @REVISION at its"
      " end for a branch, a tag or a commit"
    )
  return Address(**match.groupdict())


def fetch(path: str | os.PathLike) -> Found:
  """The file of a path; one on the Hub is downloaded unless it is in the cache.

  Args:
    path: a local path, which is only handed on, or an address.

  Raises:
    UserError: there is no such file on the Hub, it cannot be reached, or what
      came is damaged.
  """
  if not is_address(path):
    return Found(path, str(path))
  address, client = parse(str(path)), load_client()
  with failures(address):
    local = pathlib.Path(
      client.hf_hub_download(
        address.repo, address.file, revision=address.revision
      )
    )
    sha256 = _checked_hash(local, address)
  commit = local.parents[address.file.count("/")].name  # snapshots/COMMIT/FILE
  source = str(dataclasses.replace(address, revision=commit))
  return Found(local, source, sha256)


def load_client() -> types.ModuleType:
  """The package huggingface_hub.

  Raises:
    UserError: it is not installed.
  """
  if importlib.util.find_spec("huggingface_hub") is None:
    raise UserError(
      "addresses that begin with hf:// need huggingface_hub: pip install"
      " 'diffit_jax[hub]', or '.[hub]' in a checkout"
    )
  import huggingface_hub

  return huggingface_hub


@contextlib.contextmanager
def failures(address: Address) -> Iterator[None]:
  """Turns what goes wrong between here and the Hub into one sentence.

  That may be anything: the client, the HTTP library below it and the disk have
  no class of errors in common.

  Raises:
    UserError: names the address and what to do.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{address}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
  names = {each.__name__ for each in type(error).__mro__}
  for name, meaning in _MEANINGS.items():
    if name in names:
      return meaning
  status = getattr(getattr(error, "response", None), "status_code", None)
  if status in _REFUSED:
    return _REFUSED[status]
  said = (str(error).strip().splitlines() or [type(error).__name__])[0]
  # The client wraps what happens in an upload.
  cause = error.__cause__ and _reason(error.__cause__)
  return said if cause in (None, said) else f"{said} ({cause})"


def _checked_hash(local: pathlib.Path, address: Address) -> str:
  """SHA-256 of a file in the client's cache, compared with the Hub's.

  The client itself looks at the size only. In its cache the file is a link to
  one that the Hub's hash is the name of; where the file system has no links,
  nothing is compared.

  Raises:
    UserError: it is another; the file is taken out of the cache.
  """
  with local.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  expected = os.path.basename(os.readlink(local)) if local.is_symlink() else ""
  if re.fullmatch("[0-9a-f]{64}", expected) and found != expected:
    local.resolve().unlink()
    local.unlink()
    raise UserError(
      f"{address} came damaged: its SHA-256 is {found} and the Hub says"
      f" {expected}; it was taken out of the cache, so run the same command"
      " again"
    )
  return found
