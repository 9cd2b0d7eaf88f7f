"""What the documents say of the code is so."""

import importlib
import re

import jax
import jax.numpy as jnp
import pytest

from commands import ROOT
from configs import cifar10, experiments, ffhq64, imagenet256
from diffit_jax import models, sampling
from slow import slow

DOCS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_links_lead_somewhere_and_names_are_defined_there():
  for path in DOCS:
    links = re.findall(r"\[([^\]]+)\]\(([^)#:]+)\)", path.read_text())
    for text, target in links:
      if target.startswith("api/") or target == "genindex":
        continue  # of the site, which `make docs` makes and checks
      file = (path.parent / target).resolve()
      assert file.exists(), f"{path.name}: {target}"
      name = re.fullmatch(r"`(\w+)`", text)
      if name and file.suffix == ".py":
        definition = rf"^(\s*(class|def) )?{name[1]}\b"
        assert re.search(definition, file.read_text(), re.M), (text, target)


def shapes(config) -> tuple[dict[str, tuple], int]:
  """{module: shape of its output without the batch}, and the parameters."""
  model = models.make_model(config.model)
  side = config.data.resolution

  def run():
    args = jnp.zeros((1, side, side, model.channels)), jnp.zeros(1)
    variables = model.init(jax.random.key(0), *args)
    _, left = model.apply(
      variables, *args, capture_intermediates=True, mutable=["intermediates"]
    )
    return variables, left["intermediates"]

  variables, found = jax.eval_shape(run)
  outputs = {
    name: each["__call__"][0].shape[1:]
    for name, each in found.items()
    if name != "__call__" and "__call__" in each
  }
  num = sum(leaf.size for leaf in jax.tree.leaves(variables))
  return outputs, num


def boxes(title: str) -> dict[str, tuple]:
  """{module: shape} of a section's diagram; a box may stand for a row."""
  section = ARCHITECTURE.split(f"\n## {title}")[1].split("\n## ")[0]
  found = {}
  for name, last, shape in re.findall(
    r'"(\w+?)(?:\.\.(\d+))?<br>([\d x]+)"', section
  ):
    names = [name]
    if last:
      stem, first = re.fullmatch(r"(.*_)(\d+)", name).groups()
      names = [f"{stem}{i}" for i in range(int(first), int(last) + 1)]
    found |= {each: tuple(map(int, shape.split(" x "))) for each in names}
  return found


@pytest.mark.parametrize(
  "title, config",
  [
    slow("Image space", ffhq64.get_config()),
    ("Latent space", imagenet256.get_config()),
  ],
)
def test_diagrams_show_the_modules_and_their_shapes(title, config):
  outputs, num = shapes(config)
  outputs.pop("LayerNorm_0", None)  # drawn as "LayerNorm, SiLU"
  drawn = boxes(title)
  if config.model.name == "latent_diffit":  # a loop leaves no intermediates
    assert f'"blocks, {config.model.depth} in a loop<br>' in ARCHITECTURE
    outputs.pop("blocks", None)
  assert drawn == outputs
  assert f"{num:,} parameters" in ARCHITECTURE


@pytest.mark.slow
def test_other_counts():
  _, num = shapes(cifar10.get_config())
  assert f"{num:,} parameters" in ARCHITECTURE
  _, num = shapes(imagenet256.get_config())
  positions = 16 * 16 * 1152
  assert f"{num + positions:,} with" in ARCHITECTURE


def test_configs_and_their_variants_exist():
  for path in DOCS:
    if path.name == "extending.md":  # see test_extending.py
      continue
    named = re.findall(r"configs/(\w+)\.py(?::([\w=,.-]+))?", path.read_text())
    for file, arg in named:
      if file != "X":
        module = importlib.import_module(f"configs.{file}")
        module.get_config(arg.rstrip(".,"))


def test_every_experiment_has_its_command_in_the_papers_document():
  text = (ROOT / "docs" / "paper.md").read_text()
  for item, _, _, name in experiments.EXPERIMENTS:
    assert f"`configs/{name}`" in text, item


def test_every_solver_is_named_for_users():
  """In the guide, and in the comments of the configs of its process."""
  text = (ROOT / "docs" / "sampling.md").read_text()
  configs = {"edm": "ffhq64", "adm": "imagenet256", "flow": "common"}
  for solver, processes in sampling.SOLVERS.items():
    assert f"`{solver}`" in text, solver
    for process in processes:
      config = (ROOT / f"configs/{configs[process]}.py").read_text()
      (line,) = re.findall(r"sampler\.solver = .*", config)
      assert solver in line, line
