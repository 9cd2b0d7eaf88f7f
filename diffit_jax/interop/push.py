"""One exported file to a repository on the Hugging Face Hub, with its card.

`open_target` finds what can be wrong before the file is made, and asks before
others could see it; `Target.push` makes the one commit.
"""

import dataclasses
import os
import pathlib
import sys

from absl import logging

from diffit_jax.errors import UserError
from diffit_jax.interop import hub

CARD = "README.md"  # the model card, which the Hub shows as a repository's page
# In a card of ours, so that the next push may replace it and no other.
MARK = "<!-- written by diffit_jax.export; a push replaces it -->"


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a file is to go; see `open_target`.

  Attributes:
    address: of the file, without a revision.
    create: whether the repository has yet to be created.
    is_private: whether it is then for its owners alone.
  """

  address: hub.Address
  create: bool
  is_private: bool

  def push(
    self, file: str | os.PathLike, card: str, message: str
  ) -> hub.Address:
    """Uploads a file and its model card in one commit.

    A card that somebody else wrote stays as it is.

    Args:
      file: the local file.
      card: text of the model card.
      message: of the commit.

    Returns:
      The address with the commit.
    """
    client, repo = hub.load_client(), self.address.repo
    with hub.failures(self.address):
      if self.create:
        client.create_repo(repo, private=self.is_private)
      added = {self.address.file: os.fspath(file)}
      if self.create or _may_replace_card(client, repo):
        added[CARD] = card.encode()
      else:
        logging.info("%s of %s is not ours, and stays", CARD, repo)
      commit = client.create_commit(
        repo,
        [client.CommitOperationAdd(*each) for each in added.items()],
        commit_message=message,
      )
    return dataclasses.replace(self.address, revision=commit.oid)


def open_target(text: str, *, is_private: bool, is_sure: bool) -> Target:
  """Checks account and repository, and asks before a public one is created.

  Args:
    text: the address where the file is to be.
    is_private: whether a new repository is for its owners alone.
    is_sure: whether a public one is created without a question.

  Raises:
    UserError: no account, the Hub is not reached, the user says no, or there
      is nobody to ask.
  """
  address = hub.parse(text)
  if address.revision:
    raise UserError(
      f"--push={address}: a push goes to the branch main, so leave out"
      f" @{address.revision}"
    )
  info = _info(address)
  if info is None:
    if not (is_private or is_sure):
      _ask(address)
  elif is_private and not info.private:
    raise UserError(
      f"--private: {address.repo} is there already and public; make it private"
      " on its page, or push to another name"
    )
  return Target(address, info is None, is_private)


def _info(address: hub.Address):
  """What the Hub says of the repository; None where there is none yet."""
  client = hub.load_client()
  with hub.failures(address):
    client.whoami()
    try:
      return client.model_info(address.repo)
    except client.errors.GatedRepoError:
      raise
    except client.errors.RepositoryNotFoundError:
      return None


def _ask(address: hub.Address) -> None:
  """Returns if the person at the terminal wants a new public repository."""
  said = f"{address.repo} is not there yet, and would be a public repository"
  if not sys.stdin.isatty():
    raise UserError(f"{said}: add --yes for that, or --private")
  if input(f"{said}. Create it? [y/N] ").strip().lower() not in ("y", "yes"):
    raise UserError(f"nothing was pushed: {address.repo} was not created")


def _may_replace_card(client, repo: str) -> bool:
  try:
    found = client.hf_hub_download(repo, CARD)
  except client.errors.LocalEntryNotFoundError:
    raise
  except client.errors.EntryNotFoundError:
    return True
  return MARK in pathlib.Path(found).read_text(errors="replace")
