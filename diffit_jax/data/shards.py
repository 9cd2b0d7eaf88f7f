"""Makes a large data set shard by shard: resumable, by one host or by several.

TFDS has no writer that resumes or that several hosts share. Here the shard, one
ArrayRecord file, is the unit of both. The work goes on in `NAME/partial`, a
name that no reader takes for a version:

  settings.json   what the records depend on; other settings are refused
  1.0.0/          finished shards under their TFDS names
  00007.json      says that shard 7 is finished, and what is in it
  00007.partial   shard 7 while it is being written
  00007.lock      held by the process that writes it

A shard is renamed into place and then reported, so a kill costs one shard. Any
process that finds every shard finished may `finish`: it writes TFDS's metadata
and `prepared.json` and renames `1.0.0` to where readers look.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from absl import logging
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.utils.lazy_imports_utils import (
  array_record_module,
)

from diffit_jax import settings
from diffit_jax.data import classes, preparation
from diffit_jax.data import dataset as dataset_lib
from diffit_jax.errors import UserError

VERSION = "1.0.0"
_STAGING = "partial"
_SETTINGS_FILE = "settings.json"

Report = dict[str, Any]


class ShardedSet:
  """A data set in the making."""

  def __init__(
    self,
    *,
    name: str,
    data_dir: str,
    features: tfds.features.FeaturesDict,
    num_shards: int,
    settings: dict[str, Any],
    origin: dict[str, str],
    description: str,
  ):
    """Plans the data set; nothing is written before `begin`.

    Args:
      name: name of the data set.
      data_dir: where data sets live; made if missing.
      features: features of an example.
      num_shards: how many files it has.
      settings: what the records depend on, in JSON's types.
      origin: where the records come from, for error messages.
      description: what the data set is, for TFDS's metadata.
    """
    self.root = dataset_lib.root_of(name, data_dir)
    self.num_shards = num_shards
    self._name, self._data_dir = name, data_dir
    self._features, self._description = features, description
    self._settings, self._origin = settings, origin
    self._staging = self.root / _STAGING
    self._made = self._staging / VERSION

  def begin(self, overwrite: bool = False) -> pathlib.Path | None:
    """Opens the staging folder, or finds the whole data set.

    Args:
      overwrite: whether to make the set anew if it is there, and to drop shards
        that were made with other settings.

    Returns:
      The folder of a data set that is there already with the same settings;
      None where there is work to do.

    Raises:
      UserError: there is a data set, or a part of one, with other settings.
    """
    # Before anything is written, for the folder may be there to be read only.
    if not overwrite and (existing := self._find_finished()):
      with contextlib.suppress(OSError):
        self._tidy_up()
      return existing
    with _failures(self.root):
      self.root.mkdir(parents=True, exist_ok=True)
      with self._lock():
        if not overwrite and (existing := self._find_finished()):
          return existing
        self._resume(overwrite)
        self._made.mkdir(parents=True, exist_ok=True)
        mine = {"settings": self._settings, "origin": self._origin}
        _write_json(self._staging / _SETTINGS_FILE, mine)
    return None

  def _find_finished(self) -> pathlib.Path | None:
    """The whole data set, if it is there with the same settings."""
    existing = dataset_lib.find_directory(self._name, self._data_dir)
    if existing is None:
      return None
    preparation.check_same(existing, self._settings)
    logging.info("%s is there already and stays as it is", existing)
    return existing

  def _tidy_up(self) -> None:
    """Removes what a process left that was killed as it tidied up."""
    if self._staging.exists():
      with self._lock():
        if not self._made.exists():
          shutil.rmtree(self._staging, ignore_errors=True)

  def _resume(self, overwrite: bool) -> None:
    """Refuses, or drops, a staging folder with other settings."""
    file = self._staging / _SETTINGS_FILE
    if not file.exists():
      return
    former = _read_json(file)
    if former is None:
      different, origins = [f"{file.name} is damaged"], []
    else:
      different = settings.differences(former["settings"], self._settings)
      origins = settings.differences(former["origin"], self._origin)
    if not different:
      return
    if overwrite:
      shutil.rmtree(self._staging)
      return
    raise UserError(
      f"{self._staging} was begun with other settings"
      f" ({'; '.join([*different, *origins])}): refusing to mix"
      " them in one data set; go on with the former ones, give another --name,"
      " or --overwrite to drop what is there"
    )

  def report(self, index: int) -> Report | None:
    """What is in a finished shard; None where it is to be made."""
    file = self._staging / f"{index:05d}.json"
    shard = self._shard_path(index)
    if not file.exists() or not shard.exists():
      return None
    report = _read_json(file)
    if report is None or report["file_size"] != shard.stat().st_size:
      logging.warning("%s is damaged: it is made anew", shard)
      return None
    return report

  @contextlib.contextmanager
  def writing(self, index: int) -> Iterator["Shard"]:
    """Writes a shard: it counts once `commit` was called, or leaves nothing.

    Raises:
      UserError: another process is at it, or it cannot be written.
    """
    number = f"{index:05d}"
    busy = (
      f"another prepare is writing shard {index} of {self.root} right now: give"
      " each host a --shard of its own"
    )
    partial = self._staging / f"{number}.partial"
    with preparation.lock(self._staging / f"{number}.lock", busy):
      with _failures(self.root):
        shard = Shard(partial, self._features)
      try:
        yield shard
        with _failures(self.root):
          report = shard.close()
          if report:
            partial.rename(self._shard_path(index))
            _write_json(self._staging / f"{number}.json", report)
      finally:
        with contextlib.suppress(*preparation.FAILURES):
          shard.close()
        partial.unlink(missing_ok=True)

  def finish(
    self, describe: Callable[[list[Report]], dict[str, Any]]
  ) -> pathlib.Path | None:
    """Publishes the data set if every shard is finished.

    Args:
      describe: from the reports of all shards, what goes into `prepared.json`
        beside what every data set says; it may refuse by raising.

    Returns:
      The folder of the data set; None where shards are missing.
    """
    with _failures(self.root), self._lock():
      if not (self._staging / _SETTINGS_FILE).exists():  # another host did it
        return dataset_lib.find_directory(self._name, self._data_dir)
      reports = [self.report(index) for index in range(self.num_shards)]
      if None in reports:
        return None
      metadata = describe(reports)
      self._write_metadata(reports, metadata)
      target = self.root / VERSION
      existing = dataset_lib.find_directory(self._name, self._data_dir)
      for number, former in enumerate({target, existing or target}):
        if former.exists():
          former.rename(self._staging / f"former{number}")
      self._made.rename(target)
      while self._staging.exists():  # another host may free a lock meanwhile
        with contextlib.suppress(FileNotFoundError):
          shutil.rmtree(self._staging)
      return target

  def _write_metadata(
    self, reports: list[Report], metadata: dict[str, Any]
  ) -> None:
    template = self._template()
    tfds.folder_dataset.write_metadata(
      data_dir=self._made,
      features=self._features,
      split_infos=[
        tfds.core.SplitInfo(
          name="train",
          shard_lengths=[report["num_records"] for report in reports],
          num_bytes=sum(report["num_bytes"] for report in reports),
          filename_template=template,
        )
      ],
      version=VERSION,
      check_data=False,
      description=self._description,
    )
    skipped = [name for report in reports for name in report["skipped"]]
    hashes = "".join(report["hash"] for report in reports)
    common = {
      "name": self._name,
      **self._origin,
      "settings": self._settings,
      "num_images": sum(report["num_records"] for report in reports),
      "num_skipped": len(skipped),
      "skipped": skipped[: preparation.MAX_NAMES],
      # Of the records as they lie in the files, shard by shard.
      "content_hash": hashlib.sha256(hashes.encode()).hexdigest(),
    }
    if all("labels" in report for report in reports):  # older ones lack them
      counts = collections.Counter()
      for report in reports:
        counts.update(dict(report["labels"]))
      common["images_per_class"] = classes.count(
        counts, metadata["class_names"]
      )
    _write_json(self._made / dataset_lib.METADATA_FILE, common | metadata)

  def _lock(self) -> contextlib.AbstractContextManager:
    """Held while settings are compared, and while the set is published."""
    return preparation.lock(self.root / ".lock", busy=None)

  def _template(self) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
      data_dir=self._made,
      dataset_name=self._name,
      split="train",
      filetype_suffix="array_record",
    )

  def _shard_path(self, index: int) -> pathlib.Path:
    path = self._template().sharded_filepath(
      shard_index=index, num_shards=self.num_shards
    )
    return pathlib.Path(path)


class Shard:
  """One file of records while it is being written."""

  def __init__(self, path: pathlib.Path, features: tfds.features.FeaturesDict):
    self._path, self._features = path, features
    self._serializer = example_serializer.ExampleSerializer(
      features.get_serialized_info()
    )
    self._writer = array_record_module.ArrayRecordWriter(
      os.fspath(path), "group_size:1"
    )
    self._digest = hashlib.sha256()
    self._committed = False
    self._report = {"num_records": 0, "num_bytes": 0, "skipped": []}
    self._counts = collections.Counter()

  def add(self, example: dict[str, Any]) -> None:
    """Appends a record; equal examples give equal bytes in every process."""
    encoded = self._features.encode_example(example)
    record = self._serializer.get_tf_example(encoded).SerializeToString(
      deterministic=True
    )
    with _failures(self._path):
      self._writer.write(record)
    self._digest.update(record)
    self._report["num_records"] += 1
    self._report["num_bytes"] += len(record)
    self._counts[example.get("label", 0)] += 1

  def skip(self, name: str) -> None:
    """Notes something of the source that could not be read."""
    self._report["skipped"].append(name)

  def commit(self) -> None:
    """Says that nothing is missing: the file may be put in its place."""
    self._committed = True

  def close(self) -> Report | None:
    """Ends the file; what it holds if it is whole. More calls do nothing."""
    writer, self._writer = self._writer, None
    if writer is None:
      return None
    writer.close()
    if not self._committed:
      return None
    return self._report | {
      "labels": [[int(x), num] for x, num in sorted(self._counts.items())],
      "hash": self._digest.hexdigest(),
      "file_size": self._path.stat().st_size,
    }


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
  """What `_write_json` wrote; None where it is damaged."""
  try:
    return json.loads(path.read_bytes())
  except ValueError:
    return None


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes aside and renames: the file is there as a whole or not at all."""
  aside = path.with_name(f".{path.name}.new")
  aside.write_text(json.dumps(content, indent=2) + "\n")
  aside.rename(path)


@contextlib.contextmanager
def _failures(path: pathlib.Path) -> Iterator[None]:
  """Turns what a disk does into one sentence."""
  try:
    yield
  except preparation.FAILURES as error:
    raise UserError(f"cannot write {path}: {error}") from error
