"""No variable or option of JAX changes a draw, a type or a product."""

import ast
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import ROOT, start_python
from configs import digits
from diffit_jax import environment
from diffit_jax.diffusion import adm, augment
from diffit_jax.errors import UserError
from diffit_jax.models.blocks import drop_out
from diffit_jax.training.loop import train
from diffit_jax.training.objective import drop_labels

HOSTILE = {
  "JAX_ENABLE_X64": "1",
  "JAX_DEFAULT_PRNG_IMPL": "rbg",
  "JAX_THREEFRY_PARTITIONABLE": "off",
  "JAX_RANDOM_SEED_OFFSET": "7",
  "JAX_EXPLICIT_X64_DTYPES": "allow",
  "JAX_NUMPY_DTYPE_PROMOTION": "strict",
  "JAX_NUMPY_RANK_PROMOTION": "raise",
  "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
  "NVIDIA_TF32_OVERRIDE": "1",
  "FLAX_FIX_RNG_SEPARATOR": "1",
  "FLAX_PRESERVE_ADOPTED_NAMES": "1",
  "FLAX_RETURN_FROZENDICT": "1",
}
# What a command may meet: a draw, types, a product and flax's own options.
DRAWN = """
import json
import sys
from diffit_jax import cli

def main():
  import jax
  import jax.numpy as jnp
  key = jax.random.key(3)
  a = jnp.float32([1 + 2**-12])
  flax = sys.modules.get("flax")
  print(json.dumps([
    jax.random.normal(key, (3,)).tolist(),
    str(jnp.ones(1).dtype),
    str(jax.random.key_impl(key)),
    float(a @ (a + jnp.bfloat16(0))),
    bool(flax and flax.config.flax_fix_rng_separator),
  ]))
"""


def drawn_here() -> list:
  names = {}
  exec(DRAWN, names)
  said = []
  names["print"] = said.append
  names["main"]()
  return json.loads(said[0])


def run(code: str, **env) -> tuple[list, str]:
  process = start_python(["-c", f"{DRAWN}\n{code}\ncli.run(main)"], ROOT, env)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  return json.loads(out), err


def test_a_command_sets_aside_what_changes_numbers():
  found, err = run("", **HOSTILE)
  assert found == drawn_here()
  line = ", ".join(f"{name}={value}" for name, value in HOSTILE.items())
  assert sorted(HOSTILE) == sorted(map(str.upper, environment.PINNED))
  for part in line.split(", "):
    assert err.count(part) == 1 and len(err.splitlines()) == 1, err


def test_so_it_does_where_jax_is_there_already():
  """Forked: jax was imported long before, as by a config of the user's."""
  found, err = run(
    "import jax, flax\n"
    "jax.config.update('jax_threefry_partitionable', False)\n"
    "jax.config.update('jax_enable_x64', True)\n"
    "flax.config.update('flax_fix_rng_separator', True)"
  )
  assert found == drawn_here()
  assert "jax_enable_x64=True, jax_threefry_partitionable=False" in err


def test_the_usual_values_are_nothing_to_speak_of(caplog):
  usual = {"JAX_ENABLE_X64": "False", "JAX_THREEFRY_PARTITIONABLE": "yes"}
  given = usual | {"JAX_DEFAULT_PRNG_IMPL": "threefry2x32", "OTHER": "1"}
  environment.pin(given)
  assert not caplog.text and given["OTHER"] == "1"
  assert given["FLAX_FIX_RNG_SEPARATOR"] == "0"  # flax may be imported later
  assert given["JAX_THREEFRY_PARTITIONABLE"] == "1"
  assert "JAX_DEFAULT_MATMUL_PRECISION" not in given


def test_flags_of_xla_that_hide_numbers_are_refused():
  environment.pin({"XLA_FLAGS": "--xla_cpu_enable_fast_math=false --xla_a=1"})
  for flag in ("--xla_cpu_enable_fast_math", "--xla_gpu_enable_fast_min_max=1"):
    with pytest.raises(UserError, match=f"XLA_FLAGS holds {flag}, which hides"):
      environment.pin({"XLA_FLAGS": f"--xla_dump_to=x {flag}"})


def test_training_without_a_command_refuses_other_draws(tmp_path):
  with jax.enable_x64(True):
    with pytest.raises(UserError, match=r"jax_enable_x64=True .*_x64', False"):
      train(digits.get_config("debug"), tmp_path / "run")
  with jax.threefry_partitionable(False):
    with pytest.raises(UserError, match="jax_threefry_partitionable=False"):
      train(digits.get_config("debug"), tmp_path / "run")
  assert not os.listdir(tmp_path)


def test_draws_do_not_depend_on_x64():
  keys = jax.random.split(jax.random.key(11), 40)
  x = jnp.ones((40, 3, 5))

  @jax.jit
  def draw():
    return (
      adm.make_schedule().sample_level(keys),
      augment.draw_keys(keys, 0.4),
      drop_labels(keys, jnp.arange(40, dtype=jnp.int32), 99, 0.3),
      drop_out(x, 0.3, keys[0], jnp.arange(40, dtype=jnp.uint32)),
    )

  expected = draw()
  with jax.enable_x64(True):
    found = draw()
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert [a.dtype for a in jax.tree.leaves(found)] == [
    a.dtype for a in jax.tree.leaves(expected)
  ]


# How many arguments name the type, which else is JAX's default one.
TYPED = {"self.param": 4, "jax.random.normal": 3, "jax.random.uniform": 3}
TYPED |= {"jax.random.randint": 5, "jax.random.truncated_normal": 5}


@pytest.mark.parametrize("part", ["keys", "types"])
def test_every_draw_names_its_generator_and_its_type(part):
  num = 0
  for path in (ROOT / "diffit_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Call):
        continue
      name = ast.unparse(node.func)
      where = f"{path.name}:{node.lineno}: {ast.unparse(node)}"
      assert "PRNGKey" not in name, where
      if part == "keys" and name == "jax.random.key":
        num += 1
        assert ast.unparse(node.keywords).endswith("PRNG"), where
      if part == "types" and name in TYPED:
        num += 1
        assert len(node.args) >= TYPED[name], where
  assert num >= 7
