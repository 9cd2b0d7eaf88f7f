"""The process of one stage: `python -m benchmarks.on_device.child JSON`.

JSON is {"entry", "path", "end", "about"}: the stage's function, and what
`rows.Record` needs but the card, which the stage's module tells.
"""

import importlib
import json
import sys

from benchmarks.on_device import clock, rows

NO_ACCELERATOR = 78  # exit code, which ends the driver, too


def main(text: str) -> None:
  task = json.loads(text)
  module, _, function = task["entry"].partition(":")
  stage = importlib.import_module(module)
  card = stage.card()
  about = {**task["about"], "card": card}
  if card == "cpu" and not about["tiny"]:
    print("error: no accelerator is seen here", file=sys.stderr)
    sys.exit(NO_ACCELERATOR)
  clock.brief = about["tiny"]
  getattr(stage, function)(rows.Record(task["path"], about, task["end"]))


if __name__ == "__main__":
  main(sys.argv[1])
