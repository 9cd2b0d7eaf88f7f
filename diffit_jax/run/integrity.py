"""Exact checksums of arrays: what was saved is what is read.

Orbax reads a file with flipped bytes without a word, so the sums below are kept
in the checkpoint and compared after a restore. Of element i, with the bits v_i
read as unsigned integers of 32 bits,

  s = sum_i m(v_i ^ m(c + i)),   s' = sum_i m'(v_i + m'(c' + i))   mod 2^32  (1)

where m and m' mix 32 bits one to one (MurmurHash3's finaliser; C. Wellons'
lowbias32). Changing one element changes one term of each sum, since m is one to
one: one flipped bit, or any damage within one element, is always seen. Several
changed, swapped or lost elements cancel with a probability of about 2^-64.

Integer sums modulo 2^32 do not depend on the order of their terms, and i is the
element's index in the whole array. So the sum is the same number on any mesh
and any number of processes, and each device adds up what it holds: only the
sums travel. A small tree is summed by NumPy, since compiling takes longer.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

_SALT = np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15)
_WORD = 2**32
_SMALL = 2**22  # elements of a tree, which NumPy sums in a tenth of a second


class Damage(ValueError):
  """What was read is not what was saved."""


def checksums(tree, unit=None) -> dict[str, str]:
  """{path of a leaf: 16 hexadecimal digits}, the same on every process.

  Waits for the device. All processes of a mesh must call it together.

  Args:
    tree: tree of jax arrays.
    unit: structure of a subtree that comes several times in the tree, as that
      of the parameters; one program is compiled for it instead of one for all.
  """
  is_unit = lambda node: unit is not None and jax.tree.structure(node) == unit
  units, rest = [], []
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_unit):
    if is_unit(node):
      leaves = jax.tree_util.tree_leaves_with_path(node)
      units.append([((*path, *below), leaf) for below, leaf in leaves])
    else:
      rest.append((path, node))
  sums = {}
  for group in filter(None, [*units, rest]):
    arrays = [jnp.asarray(leaf) for _, leaf in group]
    if _is_small(arrays):
      values = [leaf_sums(array, xp=np) for array in jax.device_get(arrays)]
    else:
      # Waits each time: the CPU's collectives lock up if two programs overlap.
      values = jax.device_get(_compiled(_replicated(arrays))(arrays))
    for (path, _), (a, b) in zip(group, values):
      sums[_name(path)] = f"{int(a):08x}{int(b):08x}"
  return sums


def compare(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
  """Raises `Damage` that names the leaves which differ.

  Args:
    saved: sums that were stored.
    found: checksums of what was read; it may be a part of the leaves.
  """
  wrong = [name for name in sorted(found) if saved.get(name) != found[name]]
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise Damage(
      f"{wrong[0]}{more} differ from what was saved (checksum"
      f" {found[wrong[0]]} instead of {saved.get(wrong[0], 'none')})"
    )


def _name(path: Iterable) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_small(arrays: list[jax.Array]) -> bool:
  """Whether this process holds all of them, and they are few numbers."""
  size = sum(array.size for array in arrays)
  return size <= _SMALL and all(array.is_fully_addressable for array in arrays)


def _replicated(arrays: list[jax.Array]) -> NamedSharding | None:
  """Where the sums go: to every device of the arrays' mesh."""
  for array in arrays:
    if isinstance(array.sharding, NamedSharding):
      return NamedSharding(array.sharding.mesh, PartitionSpec())
  return None


@functools.cache
def _compiled(out: NamedSharding | None) -> Callable:
  """The jitted function [arrays] -> [n, 2] uint32."""
  one = jax.jit(leaf_sums)  # traced once for all leaves of one shape
  sums = lambda arrays: jnp.stack([one(array) for array in arrays])
  return jax.jit(sums, out_shardings=out)


def leaf_sums(array, word: int = _WORD, xp=jnp):
  """The two sums (1) of one array.

  Args:
    array: [...] of any plain dtype.
    word: elements that the index i counts; beyond, c and c' take the rest of
      the index. Tests make it smaller.
    xp: the library that sums, jax.numpy or, for arrays of its own, numpy.

  Returns:
    [2] uint32.
  """
  bits = _bits(array, xp)
  first = 0  # the axes before it are counted by c
  while math.prod(bits.shape[first:]) > word:
    first += 1
  c = [np.uint32(salt) for salt in _SALT]
  if first:
    high = _count(bits.shape, range(first), xp)
    c = [_murmur(high + c[0]), _lowbias(high + c[1])]
  i = _count(bits.shape, range(first, bits.ndim), xp)
  terms = (
    _murmur(bits ^ _murmur(c[0] + i)),
    _lowbias(bits + _lowbias(c[1] + i)),
  )
  # Two sums: XLA gathers the operands of one reduction of pairs.
  return xp.stack([xp.sum(term, dtype=xp.uint32) for term in terms])


def _bits(array, xp):
  """The array as uint32; an element of 64 bits becomes two."""
  if array.dtype == xp.bool_:
    array = array.astype(xp.uint8)
  size = min(array.dtype.itemsize, 4)
  unsigned = {1: xp.uint8, 2: xp.uint16, 4: xp.uint32}[size]
  if xp is jnp:
    bits = jax.lax.bitcast_convert_type(array, unsigned)
  else:
    pairs = (2,) if array.dtype.itemsize == 8 else ()
    # One element is a row: a scalar of NumPy warns where it overflows.
    bits = np.ascontiguousarray(array).view(unsigned)
    bits = bits.reshape((*array.shape, *pairs) or (1,))
  return bits.astype(xp.uint32)


def _count(shape: tuple[int, ...], axes: range, xp):
  """Row-major index over some neighbouring axes, as uint32 [*shape]."""
  index, stride = xp.zeros((1,) * len(shape), xp.uint32), 1
  for axis in reversed(axes):
    row = [1] * len(shape)
    row[axis] = shape[axis]
    along = xp.arange(shape[axis], dtype=xp.uint32).reshape(row)
    index = index + along * np.uint32(stride)
    stride *= shape[axis]
  return index


def _murmur(x):
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _lowbias(x):
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)
