"""Plans of train steps, each made by `diffit_jax.plan` once and kept in a file.

A plan takes minutes, so a table of many is made in many sittings: what the file
holds is not made again, as long as its config has not changed.
"""

import dataclasses
import datetime
import hashlib
import importlib
import json
import pathlib
import resource
import subprocess
import sys

from benchmarks import report
from diffit_jax import whole

FILE = report.ROOT / "docs" / "plans.json"

# What `knob_row` compares, one change at a time.
KNOBS = (
  {},
  {"model.remat": "none"},
  {"model.remat": "full"},
  {"num_microbatches": 4},
  {"batch_size": 512},
  {"mesh.fsdp": 1},
  {"model.dtype": "float32"},
  {"model.scan_blocks": False},
)


@dataclasses.dataclass(frozen=True)
class Case:
  """What a plan is of.

  Attributes:
    config: file of configs/, with variants after a colon.
    topology: as `diffit_jax.plan` takes it.
    fields: changed in the config, as {"model.remat": "full"}.
  """

  config: str
  topology: str
  fields: dict = dataclasses.field(default_factory=dict)

  @property
  def changes(self) -> list[str]:
    return [f"{name}={value}" for name, value in self.fields.items()]

  @property
  def key(self) -> str:
    return " ".join([self.config, self.topology, *self.changes])

  def resolved(self):
    """The config with the fields changed."""
    name, _, variant = self.config.partition(":")
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config(variant or None)
    config.update_from_flattened_dict(self.fields)
    return config

  def is_possible(self) -> bool:
    """Whether the config has the fields; the image models have no scan."""
    whole = Case(self.config, self.topology).resolved()
    known = whole.to_dict()
    return all(
      path.split(".")[-1] in _section(known, path) for path in self.fields
    )

  def digest(self) -> str:
    """Tells whether the config is the one that a kept plan is of."""
    text = json.dumps(self.resolved().to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _section(known: dict, path: str) -> dict:
  """The dict that holds the last part of a path such as model.remat."""
  for name in path.split(".")[:-1]:
    known = known[name]
  return known


def make(case: Case) -> dict:
  """Runs the planner, and returns its card with how it was made."""
  file, _, variant = case.config.partition(":")
  config = f"--config=configs/{file}.py" + (f":{variant}" if variant else "")
  command = [sys.executable, "-m", "diffit_jax.plan", "--json", config]
  command += [f"--topology={case.topology}"]
  command += [f"--config.{change}" for change in case.changes]
  print(f"planning {case.key}", file=sys.stderr, flush=True)
  before, commit = _cpu_seconds(), _commit()
  done = subprocess.run(
    command, cwd=report.ROOT, stdout=subprocess.PIPE, text=True, check=False
  )
  if done.returncode:
    raise SystemExit(f"{case.key}: no plan, exit code {done.returncode}")
  return {
    "card": json.loads(done.stdout),
    "digest": case.digest(),
    "commit": commit,
    "date": datetime.date.today().isoformat(),
    "cpu_seconds": round(_cpu_seconds() - before, 1),
  }


def _commit() -> str:
  """The last change of what is planned: the package and its configs."""
  git = lambda *args: subprocess.run(
    ["git", *args, "--", "diffit_jax", "configs"],
    cwd=report.ROOT,
    capture_output=True,
    check=True,
    text=True,
  ).stdout.strip()
  changed = " with changes" if git("status", "--porcelain") else ""
  return git("log", "-1", "--format=%h") + changed


def _cpu_seconds() -> float:
  """Of all processes that this one has waited for."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


class Kept:
  """The plans of a file; each new one is written at once."""

  def __init__(self, path: pathlib.Path = FILE):
    self._path = path
    self._plans = json.loads(path.read_text()) if path.exists() else {}

  def find(self, case: Case) -> dict | None:
    """What `make` gave for this case; None if its config was another."""
    found = self._plans.get(case.key)
    return found if found and found["digest"] == case.digest() else None

  def find_former(self, case: Case) -> dict | None:
    """The plan of an earlier version, kept to be compared with."""
    return self._plans.get(f"{case.key} formerly")

  def find_or_make(self, case: Case) -> dict:
    found = self.find(case)
    if found is None:
      found = self._plans[case.key] = make(case)
      text = json.dumps(self._plans, indent=1, sort_keys=True)
      with whole.writing(self._path) as partial:
        partial.write_text(text + "\n")
    return found


def knob_row(case: Case, card: dict) -> dict:
  """A plan beside others of the same config and slice."""
  return {
    "knob": ", ".join(case.changes) or "as configured",
    "arguments GiB": card["arguments_gib"],
    "temporaries GiB": card["temporaries_gib"],
    "fits": "yes" if card["fits"] else "no",
    "FLOPs / formula": card["flops_ratio"],
    "wire GB": card["wire_gb"],
    "step ms": span(card["step_ms"]),
    "bound by": bound_by(card),
  }


def span(ends: list[float] | None) -> str | None:
  """A range, as "58.4 to 119"."""
  if not ends:
    return None
  form = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
  return " to ".join(dict.fromkeys(map(form, ends)))


def bound_by(card: dict) -> str | None:
  """What decides the step time at the ends of its range."""
  return " or ".join(dict.fromkeys(card["bound_by"] or [])) or None
