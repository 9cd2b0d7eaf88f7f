"""The folder of a run: its config, and whether a config may continue it."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os

from etils import epath
from ml_collections import config_dict

from diffit_jax import whole
from diffit_jax.errors import UserError
from diffit_jax.run import buckets, identity, storage


def path_of(workdir: str | os.PathLike) -> epath.Path:
  """The folder as a path that may also be in a bucket (gs://).

  Raises:
    UserError: a bucket that cannot be reached from here.
  """
  path = epath.Path(workdir)
  if buckets.is_bucket(path):
    buckets.check(path)
  return path


def write_whole(path: epath.Path, content: bytes) -> None:
  """Writes a file of which a reader never sees a part."""
  if buckets.is_bucket(path):
    path.write_bytes(content)
    return
  with whole.writing(path) as partial:
    partial.write_bytes(content)


@contextlib.contextmanager
def writing(workdir: str | os.PathLike) -> Iterator[None]:
  """Turns what the file system refuses into one sentence.

  Raises:
    UserError: names the workdir.
  """
  try:
    yield
  except buckets.failures(epath.Path(workdir)) as error:
    raise UserError(
      f"cannot write to the workdir {workdir}: {buckets.first_line(error)};"
      " checkpoints are kept: free some space, or mend rights or credentials,"
      " then run the same command again"
    ) from error


def check(
  workdir: str | os.PathLike,
  config: config_dict.ConfigDict,
  data: Mapping | None = None,
) -> None:
  """Refuses a folder that holds the checkpoints of another run.

  Args:
    workdir: the folder; it need not be there.
    config: config of the run that is to go on in it.
    data: what identifies its data set; None where it is not open.

  Raises:
    UserError: names the fields that differ.
  """
  path = path_of(workdir) / "config.json"
  if not storage.list_steps(storage.checkpoints(workdir)):
    return  # nothing was made with whatever config stands there
  if not path.exists():
    raise UserError(
      f"{workdir} holds checkpoints but no config.json: use another --workdir"
    )
  try:
    old = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(
      f"{path} is damaged ({error}): delete it and the checkpoints, or use"
      " another --workdir"
    ) from error
  different = identity.differences(old, identity.resolve(config, data))
  if different:
    raise UserError(
      f"{workdir} holds another run: {'; '.join(different[:10])}; use"
      " another --workdir, or the run's own config"
    )


def enter(
  workdir: str | os.PathLike, config: config_dict.ConfigDict, data: Mapping
) -> None:
  """Checks the folder and writes `config.json`; arguments as in `check`."""
  check(workdir, config, data)
  path = path_of(workdir) / "config.json"
  resolved = identity.resolve(config, data)
  text = json.dumps(resolved, indent=2, sort_keys=True) + "\n"
  with writing(workdir):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
