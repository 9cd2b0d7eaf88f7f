"""Config files find each other; what is wrong with one is one sentence."""

import importlib
import inspect
import re
import sys

from absl import flags
import pytest

from commands import ROOT
from configs import common
from diffit_jax import cli, config_files, paths
from diffit_jax.errors import UserError

_DEFINE = flags.DEFINE
DERIVED = """
from configs import digits

def get_config(arg=None):
  config = digits.get_config(arg)
  config.seed = 7
  return config
"""


@pytest.fixture(autouse=True)
def configs_stay():
  """Other tests hold modules of the package `configs`."""
  keep = {k: m for k, m in sys.modules.items() if k.split(".")[0] == "configs"}
  yield
  for name in [k for k in sys.modules if k.split(".")[0] == "configs"]:
    del sys.modules[name]
  sys.modules.update(keep)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """An empty folder that commands are started from."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  return tmp_path


def test_a_config_outside_builds_on_ours(folder):
  (folder / "mine.py").write_text(DERIVED)
  found = config_files.load("mine.py", "debug")
  assert (found.seed, found.batch_size, found.total_steps) == (7, 16, 4)


@pytest.mark.parametrize("there", ["module", "package"])
def test_what_is_called_configs_hides_nothing_of_ours(folder, there):
  if there == "module":
    (folder / "configs.py").write_text("")
  else:
    (folder / "configs").mkdir()
    (folder / "configs/__init__.py").write_text("raise SystemExit")
    (folder / "configs/common.py").write_text("raise SystemExit")
  file = ROOT / "configs/digits.py"
  assert config_files.load(file, "debug").batch_size == 16
  assert config_files.ours("ffhq64").get_config().name == "ffhq64"


def test_neighbours_find_each_other_and_ours_wherever_they_lie(folder):
  package = folder / "elsewhere/configs"
  package.mkdir(parents=True)
  (package / "__init__.py").write_text("")
  (package / "base.py").write_text(DERIVED)
  (package / "more.py").write_text("from configs.base import get_config")
  assert config_files.load(package / "more.py", "debug").seed == 7


def test_a_config_that_hides_ours_is_named(folder):
  package = folder / "configs"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "common.py").write_text("")
  (folder / "mine.py").write_text(DERIVED)
  with pytest.raises(UserError, match="common.py hides the config of the same"):
    config_files.load("mine.py")


@pytest.mark.parametrize(
  ("name", "text", "said"),
  [
    ("a.json", '{"seed": true}', "a.json is no config file: give a Python"),
    ("a.py", "\ndef get_config(:", "config .*a.py, line 2: "),
    ("a.py", "x = 1\ny = nothing", "a.py, line 2: NameError: name 'nothing'"),
    ("a.py", "def get_config(): return 3", "returns int, not a ConfigDict"),
    ("a.py", "", "a.py: AttributeError: .* 'get_config'"),
    ("a.py", "raise ValueError('use b')", "^use b$"),
  ],
)
def test_a_wrong_config_is_one_sentence(folder, name, text, said):
  (folder / name).write_text(text)
  with pytest.raises(UserError, match=said):
    config_files.load(name)
  with pytest.raises(UserError, match="config file not found: b.py"):
    config_files.load("b.py")


def test_a_home_is_expanded_in_every_flag_that_is_a_path(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  values = flags.FlagValues()
  monkeypatch.setattr(cli.flags, "DEFINE", _define_in(values))
  cli.define_path("out", "Folder.", "runs/~x")
  assert values([""]) and values.out == "runs/~x"
  assert values(["", "--out=~/a b[1]"]) and values.out == "/home/ada/a b[1]"
  # No flag that is a path is defined in another way.
  words = {
    *("workdir", "data_dir", "out", "vae", "inception", "source", "samples"),
    *("checkpoint", "reference", "keep_samples", "build_reference", "json"),
    *("plot", "latent_workdir", "image_workdir", "torch_python"),
  }
  for folder in ("diffit_jax", "benchmarks"):
    for file in (ROOT / folder).rglob("*.py"):
      text = re.findall(r'DEFINE_string\(\s*"(\w+)"', file.read_text())
      assert not words & set(text), file


def _define_in(values: flags.FlagValues):
  return lambda *args, **kwargs: _DEFINE(*args, flag_values=values, **kwargs)


def test_paths_inside_a_config_are_expanded(folder, monkeypatch):
  class Holder:
    value = config_files.load(ROOT / "configs/imagenet256.py")

  monkeypatch.setenv("HOME", "/home/ada")
  Holder.value.init_from = "~/w.safetensors"
  Holder.value.evaluation.reference = "~/r.npz"
  found = config_files.required(Holder)
  assert found.init_from == "/home/ada/w.safetensors"
  assert found.evaluation.reference == "/home/ada/r.npz"


def test_an_unknown_home_is_one_sentence(monkeypatch):
  with pytest.raises(UserError, match="~nobody-7/x: no home directory"):
    paths.expand("~nobody-7/x")


NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common", "experiments")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_names_the_variants_and_what_the_config_varies(name):
  module = importlib.import_module(f"configs.{name}")
  header = inspect.getdoc(module)
  told = re.findall(
    r"^  (\w+)(?:=([\w.|-]+))? ", header.split("\nVariants")[1], re.M
  )
  variants = common.variants(module.base)
  assert dict(told) == {
    variant: "" if values == (False, True) else "|".join(map(str, values))
    for variant, values in variants.items()
  }
  # The first of the values is the default.
  for variant, parameter in inspect.signature(module.base).parameters.items():
    assert parameter.default == variants[variant][0], variant
  bases = [
    other for other in NAMES if f"{other}.base(" in inspect.getsource(module)
  ]
  line = header.splitlines()[0]
  assert [other for other in NAMES if f"variation of {other}" in line] == [
    *bases
  ], line


def test_a_wrong_variant_is_named_with_the_valid_ones():
  digits = importlib.import_module("configs.digits")
  with pytest.raises(
    ValueError, match=r"variant 'size' .* window=4\|2\|8"
  ):
    digits.get_config("size=3")
  with pytest.raises(ValueError, match=r"'window=3' .* use window=4\|2\|8$"):
    digits.get_config("debug,window=3")
