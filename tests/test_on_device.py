"""benchmarks.on_device: what is merged, divided and ended; and a tiny run."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks.on_device import __main__ as driver
from benchmarks.on_device import page, peaks, rows
from benchmarks.on_device.stages import CALL_SECONDS, STAGES, Stage, of_call
from commands import FAST_COMPILE, ROOT

ABOUT = {
  "card": "NVIDIA H200",
  "commit": "c1",
  "date": "2026-01-01",
  "tiny": False,
}
# The five that a bare machine lacks; `digits` alone needs them.
MISSING = """
import sys

class Missing:
  @staticmethod
  def find_spec(name, *_):
    lacking = "tensorflow tensorflow_datasets grain clu array_record"
    if name.partition(".")[0] in lacking.split():
      raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing)
"""


def row(stage: str, case: str = "a", columns=None, **about) -> dict:
  return {"stage": stage, **ABOUT, **about, "case": case, **(columns or {})}


def step(rate: float, **about) -> dict:
  columns = {
    **{"batch": 64, "attention": "xla", "remat": "dots"},
    **{"precision": "bfloat16", "images/s": rate, "model TFLOP/s": rate},
  }
  return row("train256", columns=columns, **about)


def product(rate: float, precision: str = "bfloat16", **about) -> dict:
  columns = {"precision": precision, "TFLOP/s": rate}
  return row("ceilings", columns=columns, **about)


def torch_step(rate: float, **about) -> dict:
  columns = {
    **{"pass": "step", "batch": 64, "attention": "sdpa", "compiled": "no"},
    **{"precision": "bfloat16", "images/s": rate},
  }
  return row("torch", columns=columns, **about)


# --- rows ---


def test_new_rows_replace_those_of_the_same_key_and_no_others():
  old = [row("torch", "a"), row("torch", "b"), row("vae")]
  old += [row("torch", "a", **{k: v}) for k, v in OTHER.items()]
  new = [row("torch", "c")]
  assert rows.merge(old, new) == old[2:] + new
  assert rows.merge(old, []) == old
  assert rows.merge(rows.merge(old, new), new) == old[2:] + new


OTHER = {"card": "TPU v4", "commit": "c2", "date": "2026-01-02", "tiny": True}


@pytest.mark.parametrize("name", OTHER)
def test_another_card_commit_or_date_is_another_group(name):
  found = rows.groups([row("vae"), row("vae", **{name: OTHER[name]})])
  assert len(found) == 2
  newest = next(iter(found))
  assert ("2026-01-02" in newest) == (name == "date")


def test_rows_are_read_up_to_where_a_kill_cut_them(tmp_path):
  path = tmp_path / "rows.jsonl"
  rows.append(path, row("vae"))
  with path.open("a") as file:
    file.write('{"stage": "va')
  assert rows.read(path) == [row("vae")]
  assert rows.read(tmp_path / "none") == []


def test_what_is_saved_is_loaded(tmp_path):
  path, found = tmp_path / "gpu.json", [row("vae"), row("torch")]
  assert rows.load(path) == []
  rows.save(path, found)
  assert rows.load(path) == json.loads(path.read_text()) == found
  assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]


def test_a_case_that_fails_or_has_no_time_is_a_row(tmp_path):
  path = tmp_path / "rows.jsonl"
  late = rows.Record(path, {"stage": "vae", **ABOUT}, end=0.0)
  late.attempt("late", lambda: 1 / 0, batch=3)
  good = rows.Record(path, {"stage": "vae", **ABOUT}, end=float("inf"))
  good.attempt("fails", lambda: 1 / 0)
  good.attempt("works", lambda: {"ms": 1.0})
  skipped, failed, works = rows.read(path)
  assert skipped["batch"] == 3 and "wanted" in skipped["skipped"]
  assert failed["error"] == "ZeroDivisionError: division by zero"
  assert works == row("vae", "works", {"ms": 1.0})


# --- page ---


def cells(text: str, column: str) -> list[str]:
  """A column of the tables that have it."""
  found, place = [], None
  for line in text.splitlines():
    values = [x.strip() for x in line.strip("|").split("|")]
    if column in values:
      place = values.index(column)
    elif not line.startswith("|"):
      place = None
    elif place is not None and not line.startswith("|---"):
      found.append(values[place])
  return found


def test_shares_of_the_datasheet_and_of_the_ceiling_of_that_precision():
  found = [step(200.0), product(400.0), product(800.0)]
  text = page.write([*found, product(9.0, "highest")])
  assert cells(text, "MFU of the datasheet") == [f"{200 / 989:.4g}"]
  assert cells(text, "MFU of the ceiling") == [f"{200 / 800:.4g}"]


@pytest.mark.parametrize("name", OTHER)
def test_nothing_is_divided_by_another_cards_commits_or_days_figures(name):
  other = {name: OTHER[name]}
  alone = page.write([step(200.0), product(800.0), torch_step(100.0)])
  assert "2.00 times the images/s" in alone
  assert cells(alone, "MFU of the ceiling") == ["0.25", "0.125"]

  found = [step(200.0), product(800.0, **other), torch_step(50.0, **other)]
  apart = page.write(found)
  assert "times the images/s" not in apart
  assert "MFU of the ceiling" not in apart
  assert cells(apart, "images/s").count("200") == 1

  both = page.write([*found, product(400.0), torch_step(100.0)])
  assert "2.00 times the images/s" in both and "4.00 times" not in both
  assert cells(both, "MFU of the ceiling") == ["0.5", "0.25"]


def test_an_unknown_card_has_only_the_measured_ceiling():
  unknown = {"card": "NVIDIA Z1"}
  text = page.write([step(200.0, **unknown), product(800.0, **unknown)])
  assert "MFU of the datasheet" not in text
  assert cells(text, "MFU of the ceiling") == ["0.25"]


def test_ratios_are_of_rows_that_are_otherwise_the_same():
  timed = lambda name, tokens, ms: row(
    "attention",
    "TMSA",
    {"attention": name, "tokens": tokens, "batch": 1, "forward ms": ms},
  )
  found = [timed("xla", 256, 8.0), timed("cudnn", 256, 2.0)]
  text = page.write([*found, timed("cudnn", 1024, 4.0)])
  assert "tokens 256: forward ms with attention=cudnn is 0.250 times" in text
  assert text.count("forward ms with") == 1


def test_failures_and_what_was_left_out_are_said():
  text = page.write(
    [
      row("vae", rows.PROCESS, {"error": "ended after 30 s"}),
      row("train512", "imagenet512", {"batch": 8, "skipped": "no GPU"}),
    ]
  )
  assert "- process: error: ended after 30 s" in text
  assert "- imagenet512, batch 8: skipped: no GPU" in text


def test_peaks():
  assert peaks.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
  assert peaks.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
  assert peaks.peak_flops("TPU v5 lite") == 197e12
  assert peaks.peak_flops("TPU v5") == 459e12
  for unknown in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "cpu", "TPU v9"):
    assert peaks.peak_flops(unknown) is None


def test_the_page_without_rows_has_the_commands_and_every_stage():
  text = page.write([])
  assert text.rstrip().endswith(page.NOT_YET)
  for call, seconds in enumerate(CALL_SECONDS):
    names = ",".join(of_call(call))
    assert f"--seconds={seconds} \\\n    --stages={names}\n" in text
  assert cells(text, "stage") == list(STAGES)
  assert cells(text, "at most s") == [str(s.cap) for s in STAGES.values()]


def test_the_page_in_docs_is_what_its_rows_make():
  found = rows.load(ROOT / "docs" / "gpu.json")
  assert (ROOT / "docs" / "gpu.md").read_text() == page.write(found)


# --- stages and their processes ---


def test_order_and_caps():
  assert list(STAGES) == [
    *("machine", "ceilings", "train256", "torch", "goldens", "attention"),
    *("sampling", "train512", "cifar10", "ffhq64", "vae", "inception"),
    "digits",
  ]
  assert sum(STAGES[name].cap for name in of_call(0)) == CALL_SECONDS[0]
  first = [STAGES[name].cap for name in ("sampling", "train512", "cifar10")]
  assert sum(first) == CALL_SECONDS[1]
  for stage in STAGES.values():
    module, function = stage.entry.split(":")
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert f"def {function}(" in (text := file.read_text()) or (
      f"\n{function} = " in text
    )


FAKE = """
import os, subprocess, sys, time

if "LACKING" in os.environ:
  import a_package_that_is_not_there

def card():
  return os.environ.get("CARD", "fake card")

def works(record):
  record.add("one", ms=1.0)

def crashes(record):
  record.add("one", ms=1.0)
  sys.exit("it broke")

def overruns(record):
  record.add("one", ms=1.0)
  child = subprocess.Popen(["sleep", "99"])
  record.add("child", pid=child.pid)
  time.sleep(99)
"""


def run_fake(
  folder: pathlib.Path, monkeypatch, name: str, cap=60.0, known="unknown", **env
):
  """Rows of a function of FAKE, in a process of its own."""
  (folder / "fake_stage.py").write_text(FAKE)
  for variable, value in {"PYTHONPATH": str(folder), **env}.items():
    monkeypatch.setenv(variable, value)
  stage = Stage("fake", f"fake_stage:{name}", 9, 0, "")
  return driver.run(stage, cap, {**ABOUT, "card": known}, folder)


def test_a_stage_that_works(tmp_path, monkeypatch):
  one, end = run_fake(tmp_path, monkeypatch, "works")
  assert one == row("fake", "one", {"ms": 1.0}, card="fake card")
  assert end["case"] == rows.PROCESS and end["card"] == "fake card"
  assert "error" not in end
  assert rows.read(tmp_path / "rows.jsonl") == [one, end]


def test_a_stage_that_crashes_becomes_a_row(tmp_path, monkeypatch):
  one, end = run_fake(tmp_path, monkeypatch, "crashes")
  assert one["ms"] == 1.0
  assert end["error"] == "exit code 1: it broke"
  assert "it broke" in (tmp_path / "log.txt").read_text()


def test_a_stage_that_lacks_a_package_is_left_out(tmp_path, monkeypatch):
  env = {"known": "card 7", "LACKING": "1"}
  one, end = run_fake(tmp_path, monkeypatch, "works", **env)
  lacking = "cannot import a_package_that_is_not_there"
  assert (one["skipped"], one["card"]) == (lacking, "card 7")
  assert "error" not in end


def test_without_an_accelerator_nothing_is_measured(tmp_path, monkeypatch):
  env = {"CARD": "cpu"}
  with pytest.raises(SystemExit, match="no accelerator is seen.*try --tiny"):
    run_fake(tmp_path, monkeypatch, "works", **env)
  env["known"] = "card 7"  # an earlier stage saw one, and this Python does not
  one, _ = run_fake(tmp_path, monkeypatch, "works", **env)
  assert "sees no accelerator" in one["skipped"] and one["card"] == "card 7"


def test_a_stage_that_overruns_is_ended_with_all_it_started(
  tmp_path, monkeypatch
):
  _, child, end = run_fake(tmp_path, monkeypatch, "overruns", 1.5)
  assert end["error"].startswith("ended after 2 s")
  for _ in range(500):  # it dies in its own time
    if has_ended(child["pid"]):
      break
    time.sleep(0.01)
  assert has_ended(child["pid"])


def has_ended(pid: int) -> bool:
  done = subprocess.run(
    ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
  )
  return not done.stdout or done.stdout.startswith("Z")


# --- real runs ---


def run_tiny(folder: pathlib.Path, *args: str, **env) -> list[dict]:
  """Rows of a tiny run in a process of its own."""
  command = ["-m", "benchmarks.on_device", "--tiny", f"--out={folder}", *args]
  subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": FAST_COMPILE,
      **env,
    },
    check=True,
    stdout=subprocess.DEVNULL,
  )
  return rows.load(folder / "gpu.json")


@pytest.mark.slow
def test_a_tiny_run_leaves_the_documents_alone(tmp_path):
  page_before = (ROOT / "docs" / "gpu.md").stat().st_mtime_ns
  found = run_tiny(tmp_path, "--stages=machine,ceilings", "--commit=c1")
  assert not [r for r in found if "error" in r]
  assert {r["stage"] for r in found} == {"machine", "ceilings"}
  assert {rows.key(r, ("card", "commit", "tiny")) for r in found} == {
    ("cpu", "c1", True)
  }
  products = [r for r in found if "TFLOP/s" in r]
  assert len(products) == 8 and all(r["TFLOP/s"] > 0 for r in products)
  assert (ROOT / "docs" / "gpu.md").stat().st_mtime_ns == page_before
  assert not (tmp_path / "gpu.md").exists()


@pytest.mark.slow
def test_every_stage_runs_where_the_data_packages_are_missing(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(MISSING)
  names = [s.name for s in STAGES.values() if not s.needs_torch]
  path = os.pathsep.join(filter(None, [str(tmp_path), os.getenv("PYTHONPATH")]))
  written = tmp_path / "page.md"
  args = f"--stages={','.join(names)}", f"--page={written}"
  found = run_tiny(tmp_path, *args, PYTHONPATH=path)
  assert not [r for r in found if "error" in r]
  measured = {r["stage"] for r in found if "skipped" not in r}
  of_cases = [r for r in found if r["case"] != rows.PROCESS]
  with_figures = {r["stage"] for r in of_cases if "skipped" not in r}
  assert measured == set(names) and with_figures == set(names) - {"digits"}
  (digits,) = [r for r in of_cases if r["stage"] == "digits"]
  assert digits["skipped"].startswith("cannot import grain")
  assert "MFU of the ceiling" in written.read_text()


@pytest.mark.slow
def test_the_digits_are_killed_resumed_scored_and_moved(tmp_path):
  found = run_tiny(tmp_path, "--stages=digits")
  assert not [r for r in found if "error" in r or "skipped" in r]
  whole, here, cpu, _ = found
  assert whole["steps"] == 4 and 0 <= whole["recognised"] <= 1
  for moved in (here, cpu):
    assert (moved["goes on from step"], moved["ends at step"]) == (2, 6)
    assert moved["distance of the weights"] == 0  # one and the same CPU


@pytest.mark.slow
def test_pytorch_stands_beside(tmp_path):
  python = driver.yardstick.PLACE
  if not (ROOT / python).exists():
    pytest.skip(f"{python} is missing: see benchmarks/torch_reference/")
  found = run_tiny(tmp_path, "--stages=torch")
  assert not [r for r in found if "error" in r]
  assert {r["compiled"] for r in found if "compiled" in r} >= {"no", "default"}
