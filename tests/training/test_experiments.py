"""Every experiment of the paper: its config builds, counts, and steps once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import commands
from configs.experiments import EXPERIMENTS, SWEEPS
from diffit_jax.errors import UserError
from diffit_jax.generation import generator
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.parallel import sharding
from diffit_jax.planning import listing
from diffit_jax.run import state as state_lib
from diffit_jax.training import program as program_lib
from diffit_jax.training import summary
from slow import all_but, slow

NAMES = sorted({row[3] for row in EXPERIMENTS})
# Parameters known from elsewhere, or from the network's own formula.
KNOWN = {
  "imagenet256.py": 561_035_232,
  "imagenet256.py:modulation=dit": 674_834_720,
  "imagenet256.py:depth=paper_text": 600_906_752,
  "imagenet512.py": 562_382_816,
  "cifar10.py": 15_871_011,
  "cifar10.py:blocks=4": 28_682_819,
  "cifar10.py:blocks=4,width=2-2-2": 39_352_531,
  "digits.py": 253_705,
  "ffhq64.py": 44_789_603,
  "ffhq64.py:blocks=1-2-2-2": 23_789_231,
  # 61,805,571 and 62,761,091 with 9 augmentation labels of 128 and 256.
  "cifar10_song.py": 61_805_571 - 9 * 128,
  "cifar10_song.py:network=ncsnpp": 62_761_091 - 9 * 256,
}


# Two levels, as what leads from one to the next is theirs; the rest has one.
TWO_LEVELS = ("cifar10.py", "cifar10_song.py")


def shrunk(name: str):
  """The debug form, on 8x8 images."""
  file, _, arg = name.partition(":")
  config = listing.load(f"{file}:{arg},debug" if arg else f"{file}:debug")
  config.batch_size = 2
  if config.diffusion.kind == "edm":
    config.data.resolution = 8
    config.model.base_channels = 8 if config.model.name != "song_unet" else 4
    has_two = name in TWO_LEVELS or "resize" in arg
    config.model.channel_mult = (1, 2) if has_two else (1,)
    config.model.num_blocks = 1
    config.model.dropout = 0.1
    if file == "ffhq64.py" and "window" not in arg:
      config.model.window_size = 4  # as CIFAR-10's
    # Augmentation is no part of the network, and the same in all of them.
    config.model.augment_dim, config.diffusion.augment_prob = 0, 0.0
    if config.model.name == "song_unet":
      config.model.attention_sides = (4,) if has_two else (8,)
  return config


def made_up_state(program):
  """Random parameters, all else zeros; without compiling the init."""
  rng = np.random.default_rng(0)
  zeros = lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding)
  state = jax.tree.map(zeros, program.abstract)
  normal = lambda s: rng.normal(size=s.shape, scale=0.1).astype(s.dtype)
  params = jax.tree.map(normal, program.abstract.params)
  return state_lib.replace_params(state, params)


def made_up_batch(config) -> dict:
  rng = np.random.default_rng(0)
  draw = lambda s: rng.integers(0, 3, s.shape).astype(s.dtype)
  return jax.tree.map(draw, program_lib.batch_shapes(config))


def distinct_graphs() -> dict[str, object]:
  found = {}
  for name in NAMES:
    config = shrunk(name)
    key = config.model.to_json_best_effort() + str(
      config.diffusion.get("precond")
    )
    found.setdefault(key, (name, config))
  return dict(found.values())


GRAPHS = distinct_graphs()


def test_items_of_the_paper_are_all_there():
  items = {row[0].split(",")[0].split(" (")[0] for row in EXPERIMENTS}
  items |= {row[0] for row in SWEEPS}
  tables = {f"Table {n}" for n in (1, 2, 3, 5, 7, 8, 9)}
  rungs = {f"Table 4 {rung}" for rung in "ABCDE"}
  rows = {f"Table 6 {row}" for row in "FGH"}
  figures = {"Figure 2", "Figure 7a", "Figure 7b", "Figure 8"}
  assert items >= tables | rungs | rows | figures
  assert len(GRAPHS) >= 17


@pytest.mark.parametrize(
  "name",
  all_but({n for n in KNOWN if ":" not in n}, sorted({*NAMES, *KNOWN})),
)
def test_the_full_config_builds_and_counts(name):
  """Where no count is known, of one block a level, which is traced sooner."""
  config = listing.load(name)
  if name not in KNOWN and "num_blocks" in config.model:
    config.model.num_blocks = 1
  program = program_lib.build(config, jax.devices()[:1])
  leaves = jax.tree.leaves(program.abstract.params)
  found = sum(leaf.size for leaf in leaves)
  assert KNOWN.get(name, found) == found
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
  SamplerOptions.from_config(config)


@pytest.mark.parametrize(
  "name, macs",
  [  # as they were before there were alternatives
    ("cifar10.py", 4_331_734_144),
    slow("ffhq64.py", 32_212_583_552),
    ("imagenet256.py", 118_507_290_624),
  ],
)
def test_the_alternatives_cost_the_main_path_nothing(name, macs):
  config = listing.load(name)
  network = config.model.to_json_best_effort(sort_keys=True)
  assert listing.count(network, config.data.resolution)[1] == macs


@pytest.mark.parametrize("num_devices", [slow(1), 2])
def test_a_dry_run_compiles_what_training_runs(num_devices):
  """The same program to the letter, so that training finds it in the cache."""
  config = GRAPHS["imagenet256.py"]
  program = program_lib.build(config, jax.devices()[:num_devices])
  lower = lambda *args: program.train_step.lower(*args).as_text()
  abstract = lower(*program_lib.step_arguments(config, program))
  real = lower(
    made_up_state(program),
    state_lib.new_monitor(program.mesh),
    sharding.put_batch(program.mesh, made_up_batch(config)),
  )
  assert real == abstract


# The image model trains in many tests; `make test-slow` takes all of them.
FAST = ("imagenet256.py",)
# One of each network; of the others, the step is traced and the loss computed.
STEPPED = (
  "cifar10.py",
  "cifar10.py:rung=A",
  "cifar10_song.py",
  "imagenet256.py",
  "imagenet256.py:modulation=dit",
)


@pytest.mark.parametrize("name", all_but(FAST, STEPPED))
def test_the_shrunk_form_takes_a_step_and_plans(name):
  config = GRAPHS[name]
  program = program_lib.build(config, jax.devices()[:1])
  before = made_up_state(program)
  batch = sharding.put_batch(program.mesh, made_up_batch(config))
  old = jax.tree.map(np.array, before.params)  # which is donated
  monitor = state_lib.new_monitor(program.mesh)
  state = before
  for _ in range(2):  # EDM's ramp begins with a rate of 0
    state, monitor = program.train_step(state, monitor, batch)
  assert int(monitor.bad_step) == -1 and float(monitor.loss) > 0
  moved = [
    np.any(np.asarray(new) != was)
    for new, was in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(old), strict=True
    )
  ]
  assert any(moved)
  plan = summary.describe(config, program)  # compiled, as the cache has
  assert "MACs per image" in plan and "MiB temporaries" in plan


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*GRAPHS} - {*STEPPED}))
def test_the_shrunk_form_has_a_loss_and_a_step(name):
  config = GRAPHS[name]
  program = program_lib.build(config, jax.devices()[:1])
  loss = program_lib.make_loss(program.model, config, program.mesh)
  params, batch = made_up_state(program).params, made_up_batch(config)
  losses = jax.jit(loss)(params, batch, jax.random.key(0))
  assert losses.shape == (2,) and np.isfinite(losses).all() and losses.min() > 0
  arguments = program_lib.step_arguments(config, program)
  traced = program.train_step.trace(*arguments)
  assert jax.tree.map(jnp.shape, traced.out_info[0]) == jax.tree.map(
    jnp.shape, program.abstract
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "cifar10.py:rung=A",
    "cifar10_song.py",
    "cifar10_song.py:network=ncsnpp",
    "imagenet256.py:modulation=dit",
  ],
)
def test_baselines_sample(name):
  config = shrunk(name)
  config.sampler.steps = 2
  program = program_lib.build(config, jax.devices()[:1])
  params = made_up_state(program).params
  generate = generator.make_generator(program.model, config, program.mesh)
  index = np.arange(2, dtype=np.uint32)
  samples = generate(params, 0, index, np.zeros(2, np.int32))
  assert samples.shape[:3] == (2, *[config.data.resolution] * 2)


def test_the_list_is_the_table_of_all_of_them():
  """In a fast form: the counts are those of the test above."""
  rows = [row for row in EXPERIMENTS if row[3] == "cifar10.py"]
  text = listing.table(rows[:1], SWEEPS)
  head, _, first, *_ = text.splitlines()
  assert "GMAC/image" in head and "v5e chip-hours" in head
  cells = [cell.strip() for cell in first.split("|")[1:-1]]
  assert cells[:5] == ["Table 2", "CIFAR-10", "FID 1.95", "not yet run",
                       "cifar10.py"]  # fmt: skip
  assert cells[5] == "15.9" and cells[7:9] == ["512", "390,625"]
  hours = 6 * float(cells[6]) * 1e9 * 512 * 390_625 / (197e12 * 0.4 * 3600)
  assert float(cells[9]) == pytest.approx(hours, rel=0.1)  # two digits
  assert "--sweep=guidance_scale=" in text and "estimated" in text


def test_unknown_variants_are_refused_by_name():
  for command, message in (
    ("main --config=configs/cifar10.py:rung=Z --dry_run", "rung=E|A|B|C|D"),
    ("main --config=configs/cifar10_song.py:rung=A --dry_run", "network="),
  ):
    assert message in commands.last_error(command)
  config = listing.load("cifar10.py")
  config.model.time_in = "never"
  with pytest.raises(UserError, match="model.time_in='never': use one of"):
    program_lib.build(config, jax.devices()[:1])
  config = listing.load("imagenet256.py")
  config.model.name = "ladder"
  with pytest.raises(UserError, match="'ladder': use one of"):
    program_lib.build(config, jax.devices()[:1])
  assert json.loads(listing.load("cifar10.py:rung=A").model.to_json())
