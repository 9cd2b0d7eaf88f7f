"""Workdirs in buckets (gs://): one file system, gcsfs, for all that is ours.

Config, notes, metrics, sample grids, traces and JAX's compilation cache go
through epath, which would take TensorFlow's file system wherever that is
installed, with other credentials and no emulator; `diffit_jax/__init__.py` says
no to it. Orbax writes its metadata through epath too, and arrays by
tensorstore's own driver. Both take Google's default credentials, and an
emulator from STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL.
"""

import importlib.util

from etils import epath

from diffit_jax.errors import UserError

_ADVICE = (
  "check the name and the credentials (gcloud auth application-default login or"
  " GOOGLE_APPLICATION_CREDENTIALS=FILE)"
)


def is_bucket(path: epath.Path) -> bool:
  """Whether a path lies in a bucket, where files are whole or not there."""
  return str(path).startswith("gs://")


def check(path: epath.Path) -> None:
  """Refuses a path in a bucket that cannot be reached from here.

  Raises:
    UserError: says what is missing.
  """
  if importlib.util.find_spec("gcsfs") is None:
    raise UserError(
      f"{path} needs gcsfs: pip install 'diffit_jax[gcp]', or '.[gcp]' in a"
      " checkout"
    )
  _forget_listings()
  bucket = epath.Path("gs://", *path.parts[2:3])
  try:
    exists = path.exists() or bucket.exists()
  except Exception as error:
    raise UserError(
      f"cannot reach {path}: {first_line(error)}; {_ADVICE}"
    ) from error
  if not exists:
    raise UserError(f"cannot reach {path}: no bucket {bucket}; {_ADVICE}")


def failures(path: epath.Path) -> tuple[type[Exception], ...]:
  """What reading or writing a path may raise.

  For a bucket that is anything: the libraries below (gcsfs, aiohttp, google's
  auth) have no class in common.
  """
  return (Exception,) if is_bucket(path) else (OSError,)


def first_line(error: Exception) -> str:
  """What an error says, without the pages that may follow."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def _forget_listings() -> None:
  """No listing of a folder is kept: other processes write to it as well."""
  import fsspec

  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
