"""Makes a data set once: exclusively, in a folder aside, renamed when done.

Whatever stops it, the data directory holds either the whole data set or none
(with `overwrite`: or the former one). The work goes on in `NAME/incomplete.x`,
a name that no reader takes for a version, and the last act is a rename. What a
kill leaves behind is removed by the next `prepare` of that name; a lock on the
folder keeps two of them apart.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager

from diffit_jax import settings as settings_lib
from diffit_jax.data import classes, records, transforms
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.errors import UserError
from diffit_jax.progress import Progress

_STAGING_PREFIX = "incomplete."
FAILURES = (  # of the disk, the network, and an archive that is not the one
  OSError,
  RuntimeError,  # ArrayRecord's, as of a full disk
  tfds.download.DownloadError,
  download_manager.NonMatchingChecksumError,
)
MAX_NAMES = 100  # of unreadable files, in the metadata


def prepare(
  make_builder: Callable[[str], tfds.core.DatasetBuilder],
  *,
  name: str,
  data_dir: str,
  settings: dict[str, Any],
  source: str,
  overwrite: bool = False,
  keep_downloads: bool = False,
  manual_dir: str | None = None,
  encoding: str | None = None,
) -> pathlib.Path:
  """Makes the data set `data_dir/name` unless it is there already.

  Args:
    make_builder: from the data directory that TFDS is to write under, the
      builder, in ArrayRecord format.
    name: name of the data set.
    data_dir: where data sets live; made if missing.
    settings: what the records depend on; a data set that is there is left alone
      if it was made with equal ones.
    source: what the images come from, in words, for the metadata.
    overwrite: whether to make it anew whatever is there.
    keep_downloads: whether downloads stay, in `data_dir/downloads`.
    manual_dir: where TFDS finds downloads made by hand.
    encoding: the one of `transforms.ENCODINGS` that the user asked for, if any;
      no setting, for the pixels are the same.

  Returns:
    The folder of the data set.

  Raises:
    UserError: a data set with other settings is there, another process is at
      work on it, the folder cannot be written, or the download fails.
  """
  root = dataset_lib.root_of(name, data_dir)

  def find_finished() -> pathlib.Path | None:
    existing = dataset_lib.find_directory(name, data_dir)
    if not existing or overwrite:
      return None
    check_same(existing, settings)
    _check_encoding(existing, encoding)
    logging.info("%s is there already and stays as it is", existing)
    return existing

  # Before anything is written, for the folder may be there to be read only.
  if existing := find_finished():
    if any(root.glob(f"{_STAGING_PREFIX}*")):
      with contextlib.suppress(OSError), _staging(root):
        pass  # removes what a killed prepare left
    return existing
  try:
    with _staging(root) as staging:
      if existing := find_finished():  # another prepare has just made it
        return existing
      existing = dataset_lib.find_directory(name, data_dir)
      builder = make_builder(str(staging))
      downloads = (
        pathlib.Path(data_dir) if keep_downloads else staging
      ) / "downloads"
      with contextlib.redirect_stdout(None):  # TFDS's own messages
        tfds.disable_progress_bar()
        builder.download_and_prepare(
          download_dir=downloads,
          download_config=tfds.download.DownloadConfig(
            manual_dir=manual_dir, try_download_gcs=False
          ),
        )
      made = pathlib.Path(builder.data_dir)
      metadata = _describe(builder, source, settings)
      file = made / dataset_lib.METADATA_FILE
      file.write_text(json.dumps(metadata, indent=2) + "\n")
      target = root / made.relative_to(staging / builder.name)
      for number, former in enumerate({target, existing or target}):
        if former.exists():
          former.rename(staging / f"former{number}")
      target.parent.mkdir(parents=True, exist_ok=True)
      made.rename(target)
  except FAILURES as error:
    raise UserError(f"cannot make the data set {root}: {error}") from error
  logging.info("%s: %d images", target, metadata["num_images"])
  return target


@contextlib.contextmanager
def _staging(root: pathlib.Path) -> Iterator[pathlib.Path]:
  """An empty folder in `root`, removed on the way out; `root` is locked."""
  root.mkdir(parents=True, exist_ok=True)
  try:
    busy = f"another prepare is making {root} right now"
    with lock(root / ".lock", busy):
      for stale in root.glob(f"{_STAGING_PREFIX}*"):
        logging.info("removing what a killed prepare left: %s", stale)
        shutil.rmtree(stale)
      staging = tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=root)
      try:
        yield pathlib.Path(staging)
      finally:
        shutil.rmtree(staging, ignore_errors=True)
  finally:
    with contextlib.suppress(OSError):
      root.rmdir()  # where nothing came of it


@contextlib.contextmanager
def lock(path: pathlib.Path, busy: str | None) -> Iterator[None]:
  """Holds a lock file; it is let go with the process, however that ends.

  Args:
    path: the file; removed on the way out.
    busy: what the UserError says where another process holds it; None waits.
  """
  with contextlib.ExitStack() as stack:
    while True:
      file = stack.enter_context(path.open("w"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
      except BlockingIOError:
        raise UserError(busy) from None
      except OSError as error:
        logging.warning(
          "%s cannot be locked (%s): run one prepare", path, error
        )
        break
      # The holder that we waited for has removed the file: lock the next one.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
          break
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


def check_same(existing: pathlib.Path, settings: dict[str, Any]) -> None:
  """Raises a UserError unless `existing` is whole and made with `settings`."""
  metadata = dataset_lib.read_metadata(existing)
  if not metadata:
    raise UserError(
      f"{existing} is there and was not made by this program; give another"
      " --name, or --overwrite to replace it"
    )
  differences = settings_lib.differences(
    metadata.get("settings", {}), settings
  )
  if differences:
    raise UserError(
      f"{existing} was made with other settings ({'; '.join(differences)});"
      " give another --name, or --overwrite to replace it"
    )
  if lost := dataset_lib.find_damage(existing):
    raise UserError(
      f"{existing} is damaged ({lost}); make it anew with diffit_jax.prepare"
      " and --overwrite"
    )


def _check_encoding(existing: pathlib.Path, encoding: str | None) -> None:
  # Sets of before there was a choice hold PNG files.
  former = dataset_lib.read_metadata(existing).get("encoding", "png")
  if encoding not in (None, former):
    raise UserError(
      f"{existing} holds the same images with --encoding={former}; give another"
      f" --name, or --overwrite to store them with --encoding={encoding}"
    )


def _describe(
  builder: tfds.core.DatasetBuilder, source: str, settings: dict[str, Any]
) -> dict[str, Any]:
  """The metadata of a data set that has just been written."""
  features, splits = builder.info.features, builder.info.splits
  label = features["label"] if "label" in features else None
  skipped = getattr(builder, "skipped", [])
  content_hash, counts = _read_back(builder)
  return {
    "name": builder.name,
    "source": source,
    "settings": settings,
    "encoding": records.encoding_of(features["image"]),
    "image_shape": list(features["image"].shape),
    "num_images": splits["train"].num_examples,
    "num_classes": label.num_classes if label else 0,
    "class_names": label.names if label else [],
    "images_per_class": classes.count(counts, label.names if label else []),
    "num_skipped": len(skipped),
    "skipped": skipped[:MAX_NAMES],
    "content_hash": content_hash,
  }


def _read_back(
  builder: tfds.core.DatasetBuilder,
) -> tuple[str, collections.Counter]:
  """What was written: its hash, and how many records of `train` have a label.

  The hash is SHA-256 of every record: split, id, label and pixels, in order.
  Pixels, not PNG bytes: those may differ with the compression library.
  """
  digest, counts = hashlib.sha256(), collections.Counter()
  feature = builder.info.features["image"]
  decoders = records.image_decoders(feature)
  total = sum(split.num_examples for split in builder.info.splits.values())
  with Progress(total, "checking", "images") as progress:
    for split in sorted(builder.info.splits):
      source = builder.as_data_source(split=split, decoders=decoders)
      for record in source:
        label = int(record.get("label", 0))
        counts[label] += split == "train"
        digest.update(f"{split} {record['id']!r} {label} ".encode())
        pixels = transforms.decode(record["image"], feature.shape[-1])
        digest.update(np.ascontiguousarray(pixels))
        progress.update()
  return digest.hexdigest(), counts
