"""Checksums against plain numpy, against damage, and on several meshes."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.run import integrity

WORD = 1 << 32


def murmur(x: int) -> int:
  """MurmurHash3's 32-bit finaliser (public domain, A. Appleby)."""
  x = (x ^ x >> 16) * 0x85EBCA6B % WORD
  x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
  return x ^ x >> 16


def lowbias(x: int) -> int:
  """C. Wellons' lowbias32 (public domain)."""
  x = (x ^ x >> 16) * 0x7FEB352D % WORD
  x = (x ^ x >> 15) * 0x846CA68B % WORD
  return x ^ x >> 16


def plain(array: np.ndarray, word: int = WORD) -> list[int]:
  """(1) of the module, one element after the other, in Python's integers.

  Axes before the first whose product of sizes from it on is at most `word` are
  counted by a second index, which changes c.
  """
  unsigned = np.dtype(f"u{min(array.dtype.itemsize, 4)}")
  bits = np.ascontiguousarray(array).reshape(-1).view(unsigned).tolist()
  shape = list(array.shape) + [2] * (array.dtype.itemsize == 8)
  while np.prod(shape, dtype=np.int64) > word:
    shape = shape[1:]
  count = int(np.prod(shape, dtype=np.int64))
  first = second = 0
  for position, v in enumerate(bits):
    high, low = divmod(position, count)
    c, d = 0x9E3779B9, 0x7F4A7C15
    if count < len(bits):
      c, d = murmur((high + c) % WORD), lowbias((high + d) % WORD)
    first += murmur(v ^ murmur((c + low) % WORD))
    second += lowbias((v + lowbias((d + low) % WORD)) % WORD)
  return [first % WORD, second % WORD]


def arrays() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 5, 16)).astype(np.float32)
  return {
    "float32": x,
    "bfloat16": np.asarray(jnp.asarray(x, jnp.bfloat16)),
    "float16": x.astype(np.float16),
    "int32": rng.integers(-(2**31), 2**31, (33,), np.int32),
    "uint8": rng.integers(0, 256, (7, 3), np.uint8),
    "bool": x[0] > 0,
    "scalar": np.int32(-5),
    "one": np.float32([[3.5]]),
    "special": np.float32([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45]),
    "empty": np.zeros((0, 4), np.float32),
  }


@pytest.mark.parametrize("name", arrays())
def test_sums_are_those_of_plain_integers(name):
  array = arrays()[name]
  found = jax.jit(integrity.leaf_sums)(jnp.asarray(array))
  assert found.tolist() == plain(array)
  assert integrity.leaf_sums(array, xp=np).tolist() == plain(array)
  wide = array.astype(np.float64)
  assert integrity.leaf_sums(wide, xp=np).tolist() == plain(wide)


def test_sums_of_arrays_beyond_one_word():
  """An array of more than `word` elements is counted by two indices."""
  array = arrays()["float32"]
  for word in (16, 80, 200, 640):
    found = integrity.leaf_sums(jnp.asarray(array), word)
    assert found.tolist() == plain(array, word), word
    assert integrity.leaf_sums(array, word, np).tolist() == found.tolist()
  assert plain(array, 16) != plain(array, 80) != plain(array)


def sums_of(x: np.ndarray) -> str:
  return integrity.checksums({"x": jnp.asarray(x)})["x"]


def test_every_bit_counts():
  x = arrays()["float32"][0, :2]
  seen = {sums_of(x)}
  for position in range(x.size):
    for bit in range(32):
      bits = x.copy().view(np.uint32)
      bits.flat[position] ^= np.uint32(1 << bit)
      seen.add(sums_of(bits.view(np.float32)))
  assert len(seen) == 1 + 32 * x.size  # and no two are the same


def test_pairs_of_flips_of_one_bit_do_not_cancel():
  """They do in a sum of products: 2^31 times an odd number is 2^31."""
  x = np.zeros(64, np.uint32)
  seen = {sums_of(x)}
  for i in range(64):
    for j in range(i):
      y = x.copy()
      y[[i, j]] ^= np.uint32(1 << 31)
      seen.add(sums_of(y))
  assert len(seen) == 1 + 64 * 63 // 2


def test_swaps_shifts_and_zeros_are_seen():
  x = arrays()["float32"]
  flat = x.reshape(-1)
  damaged = [x, np.roll(x, 1), np.roll(x, 1, 0), x[::-1], x.swapaxes(1, 2)]
  for i in (0, 17, 638):
    swapped = flat.copy()
    swapped[[i, i + 1]] = swapped[[i + 1, i]]
    damaged.append(swapped.reshape(x.shape))
  for size in (1, 16, 512):
    zeroed = flat.copy()
    zeroed[:size] = 0
    damaged.append(zeroed.reshape(x.shape))
  damaged += [np.zeros_like(x), np.zeros_like(x)[:-1], -np.zeros_like(x)]
  assert len({sums_of(y) for y in damaged}) == len(damaged)


def tree_on(mesh, *specs):
  """A tree of three arrays, placed by the specs."""
  values = (
    arrays()["float32"],
    arrays()["float32"].reshape(16, 40),
    arrays()["scalar"],
  )
  return {
    "a": {"kernel": place(values[0], mesh, specs[0])},
    "b": place(values[1], mesh, specs[1]),
    "count": place(values[2], mesh, ()),
  }


def place(value, mesh, spec):
  return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


MESHES = [
  (1, 1, (), ()),
  (8, 1, (), ()),
  (2, 4, (None, None, "fsdp"), ("fsdp",)),
  (1, 8, ("fsdp",), (None, "fsdp")),
  (4, 2, ("data", None, "fsdp"), (("data", "fsdp"),)),
]


@pytest.mark.parametrize("small", [0, 10**6], ids=["compiled", "numpy"])
@pytest.mark.parametrize("data, fsdp, spec_a, spec_b", MESHES)
def test_the_same_on_every_mesh(data, fsdp, spec_a, spec_b, small, monkeypatch):
  monkeypatch.setattr(integrity, "_SMALL", small)
  mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
  found = integrity.checksums(tree_on(mesh, spec_a, spec_b))
  x = arrays()["float32"]
  expected = (plain(x), plain(x.reshape(16, 40)), plain(arrays()["scalar"]))
  assert found == {
    path: f"{a:08x}{b:08x}"
    for path, (a, b) in zip(("a/kernel", "b", "count"), expected)
  }


def test_only_the_sums_travel():
  """One sum over the devices, of 2 words per leaf, and nothing gathered."""
  mesh = make_mesh(2, 4)
  tree = tree_on(mesh, (None, None, "fsdp"), ("fsdp",))
  leaves = jax.tree.leaves(tree)
  out = integrity._replicated(leaves)
  text = integrity._compiled(out).lower(leaves).compile().as_text()
  for name in ("all-gather", "all-to-all", "collective-permute"):
    assert name not in text
  reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert reduced
  for shape in reduced:
    for dims in re.findall(r"u32\[(.*?)\]", shape):
      assert np.prod([int(n) for n in dims.split(",") if n]) <= 2 * len(leaves)


def test_a_unit_gives_the_same_sums():
  params = {"k": jnp.arange(6.0), "n": {"b": jnp.ones((2, 2))}}
  tree = {
    "params": params,
    "opt": (jnp.int32(3), jax.tree.map(jnp.sin, params)),
    "ema": {"x": jax.tree.map(jnp.cos, params)},
  }
  unit = jax.tree.structure(params)
  assert integrity.checksums(tree, unit) == integrity.checksums(tree)
  assert list(integrity.checksums(tree["ema"], unit)) == ["x/k", "x/n/b"]


def test_damage_is_named():
  saved = {"ema/a": "0" * 16, "params/b": "1" * 16, "params/c": "2" * 16}
  integrity.compare(saved, {})
  integrity.compare(saved, {"params/b": "1" * 16})
  with pytest.raises(integrity.Damage, match="params/b differ.*0000000 inst"):
    integrity.compare(saved, {**saved, "params/b": "0" * 16})
  with pytest.raises(integrity.Damage, match="ema/a and 1 more"):
    integrity.compare(saved, {"ema/a": "3", "params/b": "3"})
  with pytest.raises(integrity.Damage, match="params/new .*instead of none"):
    integrity.compare(saved, {"params/new": "1" * 16})
