"""Files of which a reader never sees a part."""

from collections.abc import Iterator
import contextlib
import os
import pathlib


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which takes the name `path` after the block.

  Where the block fails, `path` stays as it was and nothing is left behind.

  Args:
    path: a local file; its folder must be there.

  Raises:
    OSError: the file cannot be renamed.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f"{path.name}.partial")
  try:
    yield partial
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise
