"""Imports point one way, and heavy packages are imported only where used."""

import ast
import functools
import pathlib
import subprocess
import sys
import time

import pytest

from commands import ROOT

PACKAGE = ROOT / "diffit_jax"
# Anyone may use these.
LEAVES = {
  *("__version__", "claim", "config_files", "environment", "errors"),
  *("interrupt", "npz", "paths", "pictures", "progress", "ranges"),
  *("settings", "stop", "whole"),
}
# A table of facts, which imports nothing of the package but errors: anyone may
# read it, wherever it lies.
FACTS = {"diffit_jax.evaluation.metrics.table"}
# What each part may import of the others; entry points may import all.
MAY_IMPORT = {
  "models": set(),
  "diffusion": set(),
  "data": set(),
  "parallel": set(),
  "autoencoder": {"interop"},  # reads diffusers' files
  "sampling": {"diffusion"},
  "interop": {"models"},
  "run": {"parallel"},
  "generation": {
    *("models", "diffusion", "sampling", "parallel", "interop", "run"),
  },
  "training": {
    *("models", "diffusion", "data", "autoencoder", "parallel", "interop"),
    "run",
  },
  "planning": {"training", "models"},  # compiles its step, counts networks
  "evaluation": {
    *("data", "parallel", "interop"),
    "diffusion",  # whether samples are latents
    "generation",  # makes samples
  },
  "web": {
    *("models", "diffusion", "sampling", "autoencoder", "parallel", "run"),
    *("generation", "evaluation"),
  },
}


# What each room of evaluation may import of the others.
ROOMS = {
  "sets": set(),
  "features": set(),
  "metrics": set(),
  "card": set(),
  "compare": {"card"},
  "sweep": {"card", "compare"},
  "collector": {"sets", "features", "metrics"},
  "measure": {"card", "collector", "sets", "metrics"},
  "scoring": {"card", "collector", "measure", "sets", "metrics"},
  "in_loop": {"card", "collector", "measure", "scoring", "sets", "features"},
}


def imports_of(path: pathlib.Path, package: str = "diffit_jax") -> set[str]:
  """Parts of a package that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      if name.startswith(f"{package}.") and name not in FACTS:
        found.add(name.removeprefix(f"{package}.").split(".")[0])
  return found


def test_every_part_is_listed():
  parts = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
  assert parts == set(MAY_IMPORT)
  rooms = {p.stem for p in (PACKAGE / "evaluation").glob("[!_]*")}
  assert rooms == set(ROOMS)


def test_facts_are_light():
  for name in FACTS:
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert imports_of(path) == {"errors"}


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part):
  for path in (PACKAGE / part).rglob("*.py"):
    extra = imports_of(path) - MAY_IMPORT[part] - LEAVES - {part}
    assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_evaluation_know_only_those_before_them(room):
  place, package = PACKAGE / "evaluation" / room, "diffit_jax.evaluation"
  paths = [*place.rglob("*.py")] or [place.with_suffix(".py")]
  for path in paths:
    extra = imports_of(path, package) - ROOMS[room] - {room}
    assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


@pytest.mark.parametrize("arrows", [MAY_IMPORT, ROOMS], ids=["parts", "rooms"])
def test_there_is_no_cycle(arrows):
  done: list[str] = []
  waiting = dict(arrows)
  while waiting:
    free = [part for part in waiting if waiting[part] <= set(done)]
    assert free, f"a cycle among {sorted(waiting)}"
    done += free
    waiting = {part: waiting[part] for part in waiting if part not in free}


def test_nothing_reaches_into_jax():
  """Its private modules change from release to release."""
  private = ".".join(("jax", "_src"))
  for folder in ("diffit_jax", "configs", "tests", "benchmarks"):
    for path in (ROOT / folder).rglob("*.py"):
      assert private not in path.read_text(), path


def test_configs_know_nothing_of_the_package():
  for path in (ROOT / "configs").glob("*.py"):
    assert not imports_of(path), path


def loaded(code: str) -> set[str]:
  """Which of the heavy packages a program has imported at its end."""
  heavy = {
    *("jax", "tensorflow", "orbax", "tensorflow_datasets", "torch"),
    *("huggingface_hub", "wandb", "trackio"),  # which may use the network
  }
  out = subprocess.run(
    [
      sys.executable,
      "-c",
      f"import sys; {code}; print({heavy} & {{*sys.modules}})",
    ],
    capture_output=True,
    check=True,
    text=True,
  ).stdout
  return ast.literal_eval(out.strip().replace("set()", "{}") or "{}") or set()


def test_the_check_sees_what_is_imported():
  assert loaded("import jax") == {"jax"}


@pytest.mark.parametrize(
  "entry",
  "main sample evaluate export prepare plan demo explore".split(),
)
def test_entry_points_are_light_until_they_work(entry):
  assert loaded(f"import diffit_jax.{entry}") == set()


def test_help_comes_at_once():
  """0.2 s where measured; a framework imported too early takes 2 to 7."""
  command = [sys.executable, "-m", "diffit_jax.sample", "--help"]
  took = []
  for _ in range(3):  # the first may read from the disk
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    took.append(time.perf_counter() - start)
  assert min(took) < 1


def test_commands_that_import_tensorflow_would_end():
  """`command_server` runs main, sample, evaluate, export and plan like this."""
  code = (
    "import sys, importlib.util, command_server;"
    " sys.meta_path.insert(0, command_server.NoTensorFlow);"
    " assert importlib.util.find_spec('tensorflow'); print('asked', flush=True)"
    "\ntry: import tensorflow\nexcept BaseException: pass"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT / "tests",
    capture_output=True,
    text=True,
  )
  assert done.returncode == 99 and done.stdout == "asked\n"
  assert "error: it imports TensorFlow" in done.stderr


def test_training_sampling_and_export_never_import_others(tmp_path):
  code = (
    "import diffit_jax.training.loop, diffit_jax.training.log as log;"
    f" writer = log.Writer('{tmp_path}', {{}}); writer.scalars(1, dict(a=1.0));"
    " import diffit_jax.generation.job, diffit_jax.generation.weights,"
    " diffit_jax.interop.files, diffit_jax.run.checkpoint,"
    " diffit_jax.autoencoder.codec, diffit_jax.evaluation.scoring,"
    " diffit_jax.evaluation.measure, diffit_jax.evaluation.sets.samples,"
    " diffit_jax.publishing"
  )
  others = {"tensorflow", "huggingface_hub", "wandb", "trackio"}
  assert not others & loaded(code)


def test_the_house_stays_flat():
  """The longest chain of modules that import one another, inside functions too.

  Prints both figures; raise a bound only with a reason.
  """
  files = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
      ".__init__"
    ): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
  }

  def imported(module: str) -> set[str]:
    found = set()
    for node in ast.walk(files[module]):
      if isinstance(node, ast.Import):
        found |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        found |= names & set(files) or {node.module}
    return found & set(files) - {module}

  @functools.cache
  def chain(module: str) -> tuple[str, ...]:
    rest = max(map(chain, imported(module)), key=len, default=())
    return (module, *rest)

  longest = max(map(chain, files), key=len)
  inside = sum(
    isinstance(node, (ast.Import, ast.ImportFrom))
    for tree in files.values()
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef)
    for node in ast.walk(function)
  )
  print(f"depth {len(longest) - 1}: {' > '.join(longest)}")
  print(f"{inside} imports inside functions")
  assert len(longest) - 1 <= 9
  assert inside <= 125  # 12 more are those of the page, of an extra
