"""Every addition of docs/extending.md works as it is printed there."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import ROOT
from diffit_jax import sampling
from diffit_jax.data import builders, pipeline, preparation
from diffit_jax.evaluation.metrics import statistics, table
from diffit_jax.models import kernels
from diffit_jax.models.kernels import probe
from diffit_jax.training import program

PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(title: str) -> list[str]:
  """The code of a section: a new file first if there is one, then the row."""
  section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
  return re.findall(r"```python\n(.*?)```", section, re.S)


def add_module(monkeypatch, name: str, code: str) -> types.ModuleType:
  """The file as a module that `import` finds."""
  module = types.ModuleType(name)
  monkeypatch.setitem(sys.modules, name, module)
  exec(code, vars(module))
  return module


def add_row(monkeypatch, module, rows: dict, code: str) -> None:
  """The row in a table that is a dict of `module`."""
  for name, row in eval(f"{{{code}}}", dict(vars(module))).items():
    assert name not in rows
    monkeypatch.setitem(rows, name, row)


def test_a_solver(monkeypatch):
  """Of order 1: its error halves with the step, on Gaussian data."""
  file, row = blocks("A solver")
  add_module(monkeypatch, "diffit_jax.sampling.edm_euler", file)
  add_row(monkeypatch, sampling, sampling.SOLVERS, row)
  assert "edm_heun or edm_euler for edm" in sampling.by_process()
  denoiser = lambda x, sigma: 0.25 * x / (sigma[0] ** 2 + 0.25)
  ends = []
  for steps in (200, 400):
    with jax.enable_x64(True):
      noise = jnp.ones((1, 1, 1, 1), jnp.float64)
      x = sampling.sample(denoiser, "edm_euler", noise, steps=steps)
      ends.append(float(x[0, 0, 0, 0]))
  exact = 80 * 0.5 / np.sqrt(80**2 + 0.25)
  errors = np.abs(np.array(ends) - exact)
  assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_a_metric(monkeypatch):
  file, row = blocks("A metric")
  add_module(monkeypatch, "diffit_jax.evaluation.metrics.mean_shift", file)
  monkeypatch.setattr(
    table, "METRICS", (*table.METRICS, *eval(f"({row})", dict(vars(table))))
  )
  assert "mean_shift_digits" in table.names("digits")
  assert table.is_distance("mean_shift_digits")
  features = np.random.default_rng(0).standard_normal((20, 3))
  samples = statistics.FeatureStatistics()
  samples.update({"pool": features})
  gaussian = (features.mean(0) + [3, 0, 4], np.eye(3))
  reference = statistics.ReferenceStatistics(gaussian, None, None, {})
  values, missing = table.score(samples, reference, ["mean_shift"])
  assert values == {"mean_shift": pytest.approx(5)} and not missing


def test_a_data_set(monkeypatch, tmp_path):
  file, row = blocks("A data set")
  add_row(monkeypatch, builders, builders.KINDS, row)
  module = add_module(
    monkeypatch, "diffit_jax.data.builders.stripes", file
  )
  preparation.prepare(**module.recipe(), data_dir=str(tmp_path))
  dataset = pipeline.open_dataset("stripes", str(tmp_path))
  assert dataset.num_images == 16 and dataset.num_classes == 4
  command = builders.command("stripes", "d")
  assert command == "python -m diffit_jax.prepare stripes --data_dir=d"


def test_an_attention(monkeypatch):
  """The probe holds it to plain XLA, gradients included."""
  (row,) = blocks("An attention")
  add_row(monkeypatch, kernels, kernels.KERNELS, row)
  for bias in ("shared", "none"):
    shape = kernels.AttentionShape(tokens=16, heads=2, width=8, bias=bias)
    probe.probe("dot_product", shape)


def test_a_config(monkeypatch):
  (file,) = blocks("A config")
  module = add_module(monkeypatch, "configs.digits_wide", file)
  config = module.get_config("width=64,debug")
  assert config.name == "digits_wide-width=64-debug"
  built = program.build(config, jax.devices()[:1])
  assert built.model.base_channels == 64
  with pytest.raises(ValueError, match="width=48|64"):
    module.get_config("width=50")
