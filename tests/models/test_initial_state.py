"""Parameters, their first values and the keys of dropout of every network.

Linen folds the names of modules into the keys of their draws, so a module that
moves or is renamed changes all three. `initial_state.json` holds them as they
were at commit 3047452; `python tests/models/test_initial_state.py` writes it
anew, after a change that is meant to change them.

Values are compared through sums, to the digits in which processors agree.
"""

import functools
import hashlib
import importlib
import json
import pathlib

from flax import traverse_util
from flax.core import Scope
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffit_jax import models
from diffit_jax.environment import PRNG
from slow import all_but

FILE = pathlib.Path(__file__).with_name("initial_state.json")
# Configs of networks without a loop, in which every draw can be looked at.
UNROLLED = (
  "cifar10:",
  "cifar10:rung=A",
  "cifar10:rung=B",
  "cifar10:rung=C",
  "cifar10:rung=D",
  "cifar10_song:",
  "cifar10_song:network=ncsnpp,tmsa",
  "digits:",
  "ffhq64:",
  "cifar10:debug",
  "cifar10:debug,rung=A",
  "cifar10:debug,rung=B",
  "cifar10:debug,rung=D",
  "cifar10_song:debug,tmsa",
  "cifar10_song:debug,network=ncsnpp",
  "digits:debug",
  "digits:debug,time_in=rpb_time",
  "digits:debug,time_in=mlp_time",
  "digits:debug,time_in=separate",
  "digits:debug,time_in=plain",
  "ffhq64:debug",
)
# Those whose blocks are a loop, and which of them are drawn in full.
SCANNED = (
  "digits_latent:",
  "imagenet256:",
  "imagenet256:modulation=dit",
  "imagenet512:",
  "digits_latent:debug",
  "imagenet256:debug",
  "imagenet256:debug,modulation=dit",
  "imagenet512:debug",
)
# One of every network, and every place of time; `make test-slow` runs all.
FAST = (
  "cifar10:debug",
  "cifar10:debug,rung=A",
  "cifar10_song:debug,tmsa",
  "cifar10_song:debug,network=ncsnpp",
  "digits:debug",
  "digits:debug,time_in=separate",
  "digits_latent:debug",
  "imagenet256:debug,modulation=dit",
)
DRAWN = ("digits_latent:debug", "imagenet256:debug,modulation=dit")


def model_and_side(name: str):
  file, _, arg = name.partition(":")
  config = importlib.import_module(f"configs.{file}").get_config(arg)
  return models.make_model(config.model), config.data.resolution


def init(model, side: int, **kwargs) -> dict:
  """{path: first value}, drawn as `program.init_params` does it."""
  rngs = {"params": key(0), "dropout": key(1)}
  x = jnp.zeros((1, side, side, model.channels))
  params = model.init(rngs, x, jnp.zeros(1), **kwargs)["params"]
  return traverse_util.flatten_dict(params, sep="/")


def key(seed: int):
  with jax.ensure_compile_time_eval():
    return jax.random.key(seed, impl=PRNG)


def total(x) -> float:
  return float(np.abs(np.asarray(x, np.float64)).sum())


def digest(shapes: dict) -> str:
  """Number of the arrays, and a hash of their paths, shapes and dtypes."""
  lines = [f"{p} {shapes[p].shape} {shapes[p].dtype}" for p in sorted(shapes)]
  text = hashlib.sha256("\n".join(lines).encode()).hexdigest()
  return f"{len(lines)} {text[:16]}"


def trace(model, side: int) -> tuple[dict, dict, list]:
  """({path: shape}, {path: size of first values}, keys of dropout).

  Only the keys and a corner of each array, up to three numbers along an axis,
  are computed: that needs few programs, and depends on key and initialiser.
  """
  model = model.clone(dropout=0.5)
  first, keys = {}, []
  param, make_rng = Scope.param, Scope.make_rng

  def record_param(scope, name, full, *args, **kwargs):
    def draw_corner(key, shape, *rest):
      with jax.ensure_compile_time_eval():
        corner = full(key, tuple(min(size, 3) for size in shape), *rest)
      first["/".join((*scope.path, name))] = total(corner)
      return jnp.zeros(shape, corner.dtype)

    return param(scope, name, draw_corner, *args, **kwargs)

  def record_key(scope, name="params"):
    with jax.ensure_compile_time_eval():
      key = make_rng(scope, name)
      if name == "dropout":
        keys.extend(jax.random.key_data(key).tolist())
    return key

  index = jnp.zeros(1, jnp.uint32)
  run = functools.partial(init, model, side, sample_index=index)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Scope, "param", record_param)
    patch.setattr(Scope, "make_rng", record_key)
    return jax.eval_shape(run), first, keys


def state_of(name: str) -> dict:
  """What is compared, of one network."""
  model, side = model_and_side(name)
  rounded = lambda value: float(f"{value:.7g}")
  if name in UNROLLED:
    shapes, first, keys = trace(model, side)
    found = dict(first=rounded(sum(first.values())), dropout=keys)
  else:
    shapes, first = jax.eval_shape(functools.partial(init, model, side)), {}
    found = {}
  if name in DRAWN:
    values = jax.jit(functools.partial(init, model, side))()
    first = {path: total(value) for path, value in values.items()}
  if "debug" in name and first:
    found["first"] = [rounded(first[path]) for path in sorted(first)]
  return {"tree": digest(shapes), **found}


@functools.cache
def expected() -> dict:
  return json.loads(FILE.read_text())


@pytest.mark.parametrize("name", all_but(FAST, [*UNROLLED, *SCANNED]))
def test_the_state_is_what_it_was(name):
  found, wanted = state_of(name), expected()[name]
  first = found.pop("first", 0), wanted.get("first", 0)
  assert found == {k: v for k, v in wanted.items() if k != "first"}
  np.testing.assert_allclose(*first, 1e-5)


def forward() -> list[float]:
  """Sums of two samples' outputs, half of what the layer sees being dropped."""
  model = models.make_model(digits.get_config("debug").model)
  model = model.clone(dropout=0.5)

  def run(index):
    shape = (2, 8, 8, 1)
    x = jnp.cos(jnp.arange(128, dtype=jnp.float32)).reshape(shape)
    shapes = jax.eval_shape(model.init, key(0), x, jnp.zeros(1))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten(
      [
        jnp.sin(jnp.arange(leaf.size) * 0.7 + i).reshape(leaf.shape)
        * (leaf.shape[-2] if leaf.ndim > 1 else 9) ** -0.5
        for i, leaf in enumerate(leaves)
      ]
    )
    rngs = {"dropout": key(1)}
    return model.apply(
      {"params": params}, x, jnp.array([0.3, 0.9]), sample_index=index,
      rngs=rngs,
    )  # fmt: skip

  return [total(out) for out in jax.jit(run)(jnp.array([3, 70_001]))]


def test_one_forward_pass_with_dropout():
  np.testing.assert_allclose(forward(), expected()["forward"], 1e-4)


def main() -> None:
  state = {name: state_of(name) for name in (*UNROLLED, *SCANNED)}
  state["forward"] = forward()
  lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in state.items()]
  FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  main()
