"""The process of one stage: `python -m benchmarks.on_device.child JSON`.

JSON is {"entry", "path", "end", "about"}: the stage's function, and what
`rows.Record` needs, with the card of the stages before. The module says what
this stage runs on. Where it cannot be imported, a row says so.
"""

import importlib
import json
import sys

from benchmarks.on_device import clock, rows

NO_ACCELERATOR = 78  # exit code, which ends the driver, too
UNKNOWN = "unknown"  # the card, until a stage tells it


def main(text: str) -> None:
  task = json.loads(text)
  record = rows.Record(task["path"], task["about"], task["end"])
  module, _, function = task["entry"].partition(":")
  try:
    stage = importlib.import_module(module)
  except ModuleNotFoundError as error:
    record.add("all", skipped=f"cannot import {error.name}")
    return
  card = stage.card()
  if card == "cpu" and not record.is_tiny:
    if record.about["card"] == UNKNOWN:
      print("error: no accelerator is seen here", file=sys.stderr)
      sys.exit(NO_ACCELERATOR)
    record.add("all", skipped="this Python sees no accelerator")
    return
  record.about["card"] = card
  clock.brief = record.is_tiny
  getattr(stage, function)(record)


if __name__ == "__main__":
  main(sys.argv[1])
