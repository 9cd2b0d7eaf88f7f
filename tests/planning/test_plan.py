"""Whole plans of small models: compiled for TPU slices and for CPU devices."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from commands import last_error, succeed
from configs import imagenet256
from diffit_jax.planning import (
  aot,
  figures,
  planner,
  remedy,
  roofline,
  search,
  table,
  topology,
)

pytestmark = pytest.mark.usefixtures("libtpu_environment")

CARD_KEYS = {
  *("arguments_gib", "temporaries_gib", "fits", "flops_ratio", "collectives"),
  *("wire_gb", "chips", "total_gib", "hbm_gib", "over_gib", "mfu", "step_ms"),
  *("recompute_overhead", "epochs_per_day", "chip_hours", "missing"),
}


def small_config(**fields):
  """XL with 2 blocks of 128 on 64 tokens, which compiles in seconds."""
  config = imagenet256.get_config()
  small = {
    "batch_size": 64,
    "data.resolution": 16,
    "model.input_size": 16,
    "model.hidden_dim": 128,
    "model.depth": 2,
    "model.num_heads": 8,
  }
  return planner.changed(config, small | fields)


def make_plan(config, name: str) -> planner.Plan:
  wanted = topology.parse(name)
  return planner.make_plan(config, wanted, topology.devices(wanted))


@pytest.fixture(scope="module")
def tpu_plan(libtpu_environment) -> planner.Plan:
  pytest.importorskip("libtpu")
  return make_plan(small_config(), "v5e:4x4")


def test_a_slice_of_16_chips(tpu_plan):
  card = figures.to_json(tpu_plan)
  assert card.keys() >= CARD_KEYS
  assert json.loads(json.dumps(card)) == card
  assert card["chips"] == 16 and card["mesh"] == {"data": 1, "fsdp": 16}
  assert card["fits"] is True and card["hbm_gib"] == 15.75
  assert card["collectives"]["collective-permute"] == 0
  assert card["collectives"]["all-to-all"] == 0
  assert card["collectives"]["all-gather"] > 0
  assert card["missing"] == []
  better, worse = card["step_ms"]
  assert 0 < better <= worse and card["mfu"][0] >= card["mfu"][1] > 0
  # 64 images of 1,281,167 in each of the day's steps.
  epochs = 86400 / (better / 1e3) * 64 / 1_281_167
  assert card["epochs_per_day"][0] == pytest.approx(epochs)
  hours = 7e6 * better / 3.6e6 * 16
  assert card["chip_hours"][0] == pytest.approx(hours)
  for line in table.to_table(card).splitlines():
    assert len(line) <= 90, line


def test_flops_with_and_without_remat(tpu_plan):
  # Backward passes leave out the gradients of inputs that are data: the
  # patches (8 x 8 tokens of 2 x 2 x 4) and the time embedding's 256 waves.
  macs = tpu_plan.formula_flops / 6 / 64
  without = 64 * 16 * 128 + 256 * 128
  # Each of 16 devices spreads the bias of 2 blocks by itself, by products with
  # zeros and ones, axis by axis; the backward pass takes each product once.
  side, heads = 8, 8
  rows = 2 * side - 1
  spread = heads * (rows**2 * side**2 + rows * side**4) * 16 * 2 / 64
  expected = 1 - without / (3 * macs) + 2 * spread / (3 * macs)
  plain_ratio = tpu_plan.plain_flops / tpu_plan.formula_flops
  assert plain_ratio == pytest.approx(expected, abs=1e-6)
  # "dots" runs the two products that have batch dimensions once more, n^2 c
  # each in each of 2 blocks, and the bias, in a step of 3 forward passes.
  again = (2 * 2 * 64 * 64 * 128 + spread) / (3 * macs)
  overhead = tpu_plan.step_flops / tpu_plan.formula_flops - plain_ratio
  assert overhead == pytest.approx(again, abs=1e-6)


def test_state_is_split_16_ways(tpu_plan):
  """Weights, two moments and one average, float32, a 16th of each kernel."""
  state = tpu_plan.memory.arguments
  step = aot.trace(tpu_plan.config, topology.devices(topology.parse("cpu:1")))
  whole = step.argument_bytes
  assert whole / 16 < state < 1.5 * whole / 16 + 64 * 4 * 16 * 16 * 8


@pytest.mark.slow
def test_cpu_devices_without_libtpu(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  card = figures.to_json(make_plan(small_config(), "cpu:8"))
  assert card.keys() >= CARD_KEYS
  assert card["mesh"] == {"data": 1, "fsdp": 8}
  assert card["fits"] is None and card["step_ms"] is None
  assert card["arguments_gib"] > 0 and card["temporaries_gib"] > 0
  assert 1 < card["flops_ratio"] < 1.05
  assert card["collectives"]["all-gather"] > 0
  missing = " ".join(card["missing"])
  assert "fits" in missing and "roofline" in missing and "libtpu" in missing


@pytest.mark.slow
def test_what_does_not_fit_and_by_how_much():
  """XL on one chip: the compiler's verdict takes seconds."""
  pytest.importorskip("libtpu")
  config = planner.changed(
    imagenet256.get_config(), {"model.remat": "none", "batch_size": 64}
  )
  plan = make_plan(config, "v5e:1x1")
  card = figures.to_json(plan)
  assert card["fits"] is False
  # 561 M parameters in four float32 copies, and a batch.
  assert card["arguments_gib"] == pytest.approx(
    4 * 4 * 561.0e6 / 2**30, rel=0.01
  )
  assert card["over_gib"] == pytest.approx(card["total_gib"] - 15.75)
  assert card["over_gib"] > 1
  assert card["collectives"] is None and card["step_ms"] is None
  assert "lower bound" in card["missing"][0]
  assert "DOES NOT FIT" in table.to_table(card)


@pytest.mark.slow
def test_a_program_that_libtpu_cannot_print(monkeypatch):
  """As XL's on v6e:4x4 with libtpu 0.0.52."""

  def as_text(self):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  pytest.importorskip("libtpu")
  monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
  tiny = {"batch_size": 4, "model.hidden_dim": 64, "model.depth": 1}
  card = figures.to_json(make_plan(small_config(**tiny), "v5e:1x1"))
  assert card["fits"] and 0 < card["total_gib"] < 1
  assert 1 < card["flops_ratio"] < 1.1
  assert card["collectives"] is None and card["step_ms"] is None
  assert "fails to print" in card["missing"][0]
  assert "fits" in table.to_table(card)


def test_tensorflow_is_never_imported():
  code = (
    "import sys;"
    " from diffit_jax.planning import planner, remedy, figures, search, table;"
    " print('tensorflow' in sys.modules)"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  assert out.strip() == "False"


def test_out_of_memory_messages():
  message = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM,"
    " the total memory required for HLO temporaries (240.00G) exceeds"
    " available HBM (15.75G). HLO module: jit_step."
  )
  needed, available = aot.parse_out_of_memory(message)
  assert (needed / 2**30, available / 2**30) == (240.0, 15.75)
  assert aot.parse_out_of_memory("INTERNAL: something else") is None


@pytest.mark.slow
def test_mixed_precision_passes():
  """bfloat16 blocks take 1 pass, the float32 of the paper's setting takes 6."""
  devices = topology.devices(topology.parse("cpu:1"))
  paper = small_config(
    **{"model.dtype": "float32", "matmul_precision": "highest"}
  )
  flops = lambda step: 2 * sum(p.macs for p in step.products)
  step = aot.trace(paper, devices)
  assert roofline.bf16_flops(step.products) == 6 * flops(step)
  step = aot.trace(small_config(), devices)
  assert roofline.bf16_flops(step.products) == flops(step)


def test_remedies_go_from_cheap_to_costly(monkeypatch, tpu_plan):
  plan = dataclasses.replace(
    tpu_plan,
    mesh={"data": 16, "fsdp": 1},
    config=small_config(**{"model.remat": "none"}),
  )
  sharded = {"mesh.data": -1, "mesh.fsdp": 16}
  dots, full = {"model.remat": "dots"}, {"model.remat": "full"}
  assert list(remedy.remedies(plan.config, plan.mesh)) == [
    sharded,
    dots,
    full,
    sharded | dots,
    sharded | full,
    sharded | full | {"num_microbatches": 2},
    sharded | full | {"num_microbatches": 4},
  ]
  fit = lambda plan, fields, devices: ("mesh.fsdp" in fields, 10 * 2**30)
  monkeypatch.setattr(planner, "try_fields", fit)
  trials = remedy.find(plan, [])
  assert [trial.fields for trial in trials] == [sharded]
  text = remedy.to_text(trials)
  assert "--config.mesh.fsdp=16: 10.00 GiB, fits" in text
  monkeypatch.setattr(planner, "try_fields", lambda *_: (False, 20 * 2**30))
  trials = remedy.find(plan, [])
  assert len(trials) == 7 and "more chips" in remedy.to_text(trials)
  assert remedy.to_json(trials)["found"] is None


@pytest.mark.parametrize("start", [1, 3, 16, 500])
@pytest.mark.parametrize("fixed, each", [(1.0, 0.148), (8.4, 0.03), (0.5, 7.0)])
def test_largest_size_on_a_straight_line(fixed, each, start):
  probes = []

  def probe(size):
    probes.append(size)
    return fixed + each * size <= 15.75, fixed + each * size

  found = search.largest_size(probe, 15.75, start)
  exact = int((15.75 - fixed) / each)
  assert exact / 1.125 - 1 < found <= exact
  assert len(probes) == len(set(probes)) <= 8


@pytest.mark.slow
def test_search_over_remat_policies(monkeypatch, tpu_plan):
  """Memory of a line per policy: 64, 128 and 256 images per chip would fit."""
  gib, each = 2**30, {"none": 1 / 64, "dots": 1 / 128, "full": 1 / 256}

  def fit(plan, fields, devices):
    total = 14.75 + each[fields["model.remat"]] * fields["batch_size"] / 16
    return total <= 15.75, int(total * gib)

  monkeypatch.setattr(planner, "try_fields", fit)
  devices = topology.devices(topology.parse("cpu:1"))
  big = small_config(batch_size=16 * 100)
  plan = dataclasses.replace(tpu_plan, config=big)
  found = search.search(plan, devices)
  sizes = {policy.remat: policy.batch_per_chip for policy in found}
  assert sizes == {"none": 64, "dots": 128, "full": 256}
  fits = {policy.remat: policy.fits_config for policy in found}
  assert fits == {"none": False, "dots": True, "full": True}
  assert search.to_json(found)["cheapest_remat"] == "dots"
  assert "--config.model.remat=dots" in search.to_table(found)


def test_nothing_fits():
  assert search.largest_size(lambda size: (False, 99.0), 15.75, 4) == 0


def test_the_command_prints_json_and_errors_in_one_line():
  command = "plan --config=configs/imagenet256.py:debug --topology=cpu:2 --json"
  card = json.loads(succeed(command))
  assert card["chips"] == 2 and card.keys() >= CARD_KEYS
  line = last_error("plan --config=configs/digits.py --topology=v5litepod-16")
  assert "v5litepod-16" in line and "v5e:4x4" in line
  line = last_error("plan --config=configs/digits.py --topology=cpu:2 --search")
  assert "--search" in line
