"""The layout of the released weights (diffit_256/512.safetensors), both ways.

A flat safetensors file of the released model's state dict. Ours differ in

  PyTorch Linear [out, in], Conv [out, c, pr, pc]  -> kernel [in, out], with the
      inputs of a patch in the order (c, pr, pc)
  blocks.0.X, blocks.1.X, ...                      -> blocks/X stacked on axis 0
  pos_embed, relative_position_index               -> recomputed, not stored

Nothing is assumed about sizes: each symbol in the tables below (`width`,
`tokens`, ...) takes the value that most tensors give it, and tensors that
disagree are reported. What is recomputed is compared with the file first.

Reading goes tensor by tensor from the mapped file into the final arrays, and
writing tensor by tensor into a partial file that is renamed, so neither holds
more than the parameters and one tensor.

CHOICE: tensors of other float types are read as the float32 values they stand
for (`tensors`); files are always written in float32.
CHOICE: the label table's last row is the null class, as in the release; a file
cannot say otherwise, but `load_official(path, null_label=False)` can.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
import json
import math
import os
import pathlib
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax import whole
from diffit_jax.environment import PRNG
from diffit_jax.errors import UserError
from diffit_jax.interop import native, tensors
from diffit_jax.models.embeddings import sincos_positions
from diffit_jax.models.latent import STACKED, LatentDiffiT

# Official key: (our path, or None where the tensor is recomputed; its shape).
_ENDS = {
  "pos_embed": (None, "1 tokens width"),
  "x_embedder.proj.weight": (
    "patch_embed/kernel",
    "width channels patch patch",
  ),
  "x_embedder.proj.bias": ("patch_embed/bias", "width"),
  "t_embedder.mlp.0.weight": ("time_embed/fc1/kernel", "width frequencies"),
  "t_embedder.mlp.0.bias": ("time_embed/fc1/bias", "width"),
  "t_embedder.mlp.2.weight": ("time_embed/fc2/kernel", "width width"),
  "t_embedder.mlp.2.bias": ("time_embed/fc2/bias", "width"),
  "y_embedder.embedding_table.weight": (
    "label_embed/embedding",
    "labels width",
  ),
  "final_layer.linear.weight": ("head/kernel", "outputs width"),
  "final_layer.linear.bias": ("head/bias", "outputs"),
}
_BLOCK = {
  "attn.relative_position_bias_table": (
    "attn/relative_position_bias_table",
    "offsets heads",
  ),
  "attn.relative_position_index": (None, "tokens tokens"),
  "attn.qkv_temb.weight": ("attn/qkv_temb/kernel", "qkv width"),
  "attn.qkv_temb.bias": ("attn/qkv_temb/bias", "qkv"),
  "attn.qkv.weight": ("attn/qkv/kernel", "qkv width"),
  "attn.qkv.bias": ("attn/qkv/bias", "qkv"),
  "attn.proj.weight": ("attn/proj/kernel", "width width"),
  "attn.proj.bias": ("attn/proj/bias", "width"),
  "mlp.fc1.weight": ("mlp/fc1/kernel", "hidden width"),
  "mlp.fc1.bias": ("mlp/fc1/bias", "hidden"),
  "mlp.fc2.weight": ("mlp/fc2/kernel", "width hidden"),
  "mlp.fc2.bias": ("mlp/fc2/bias", "width"),
}
_INDEX = "relative_position_index"
# How far a file's pos_embed may be from ours: rounding of its dtype, and for
# float32 that of an angle of at most 100.
_POSITION_TOLERANCE = {"F32": 1e-5, "F64": 1e-5, "F16": 1e-3, "BF16": 1e-2}
_MAX_LISTED = 10


def load_official(
  path: str | os.PathLike, *, null_label: bool = True
) -> tuple[LatentDiffiT, dict]:
  """Reads released weights.

  Args:
    path: a safetensors file in the official layout.
    null_label: whether the last row of its label table is the null class.

  Returns:
    The float32 model with scanned blocks that the tensors' shapes describe, and
    its parameters as a nested dict of numpy float32 arrays.

  Raises:
    UserError: no such file, not a whole safetensors file, or keys or tensors
      that are missing, unknown, misshapen or of a wrong kind; all are listed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path} is not a file: give a .safetensors file")
  with tensors.open_file(path) as file:
    slices = {key: file.get_slice(key) for key in file.keys()}
    shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
    dtypes = {key: s.get_dtype() for key, s in slices.items()}
    depth = _count_blocks(shapes)
    sizes = _vote_sizes(_layout(depth), shapes)
    _check_layout(path, _layout(depth), sizes, shapes, dtypes)
    model = _make_model(sizes, depth, null_label)
    params = jax.tree.map(_aligned_empty, _abstract_params(model))
    flat = traverse_util.flatten_dict(params, sep="/")
    index = relative_position_index(model.grid)
    for key, (ours, _) in _layout(depth).items():
      if key == "pos_embed":
        tensor = tensors.read_float32(file, key)
        _check_positions(path, tensor, model, dtypes[key])
      elif ours is None:
        tensor = file.get_tensor(key)
        if not np.array_equal(tensor, index.astype(tensor.dtype)):
          raise UserError(f"{path}: {key} is not that of {model.grid} rows")
      else:
        tensor = tensors.read_float32(file, key)
        if ours.endswith("/kernel"):
          tensor = tensor.reshape(len(tensor), -1).T
        _pick(flat, ours)[...] = tensor
  return model, params


def save_official(
  path: str | os.PathLike, model: LatentDiffiT, params: Mapping
) -> None:
  """Writes exactly the released keys, shapes and dtypes; atomic.

  Args:
    path: ends in .safetensors.
    model: whose parameters they are.
    params: nested dict of arrays, blocks stacked or not.

  Raises:
    UserError: the parameters are not the model's, or writing failed.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise UserError(f"{path}: the file's name must end in .safetensors")
  stacked = STACKED in params
  expected = _abstract_params(model.clone(scan_blocks=stacked))
  native.check_tree(params, expected, f"the tree to write to {path}")
  flat = traverse_util.flatten_dict(dict(params), sep="/")
  layout, shapes = _layout(model.depth), official_shapes(model)

  def read(key: str) -> np.ndarray:
    ours = layout[key][0]
    if key == "pos_embed":
      return sincos_positions(model.hidden_dim, model.grid)[None]
    if ours is None:
      return relative_position_index(model.grid)
    tensor = np.asarray(_pick(flat, ours), np.float32)
    return (tensor.T if ours.endswith("/kernel") else tensor).reshape(
      shapes[key]
    )

  _write(path, shapes, read)


def official_shapes(model: LatentDiffiT) -> dict[str, tuple[int, ...]]:
  """Every key of the official layout and its tensor's shape."""
  sizes = _sizes_of(model)
  layout = _layout(model.depth)
  return {key: _shape(symbols, sizes) for key, (_, symbols) in layout.items()}


def relative_position_index(side: int) -> np.ndarray:
  """The release's buffer: [n, n] int64 rows of the bias table, n = side^2.

  (row_n - row_m + side - 1) (2 side - 1) + (col_n - col_m + side - 1)
  """
  row, col = np.divmod(np.arange(side**2, dtype=np.int64), side)
  rows = row[:, None] - row + side - 1
  return rows * (2 * side - 1) + col[:, None] - col + side - 1


def _layout(depth: int) -> dict[str, tuple[str | None, str]]:
  """Official key -> (our path, shape in symbols); block 3 is "blocks.3/"."""
  blocks = {
    f"blocks.{b}.{key}": (ours and f"{STACKED}.{b}/{ours}", shape)
    for b in range(depth)
    for key, (ours, shape) in _BLOCK.items()
  }
  return {**_ENDS, **blocks}


def _pick(flat: Mapping, ours: str) -> np.ndarray:
  """The leaf of a layout's path, in a stacked or unrolled flat tree."""
  first, rest = ours.split("/", 1)
  name, _, block = first.partition(".")
  if not block:
    return flat[ours]
  if f"{name}/{rest}" in flat:
    return flat[f"{name}/{rest}"][int(block)]
  return flat[f"{name}_{block}/{rest}"]


def _count_blocks(keys: Iterable[str]) -> int:
  found = [re.match(r"blocks\.(\d{1,4})\.", key) for key in keys]
  return max((int(match[1]) + 1 for match in found if match), default=1)


def _vote_sizes(layout: Mapping, shapes: Mapping) -> dict[str, int]:
  """For each symbol the value that most tensors of the right rank give."""
  votes = defaultdict(Counter)
  for key, (_, symbols) in layout.items():
    if len(shapes.get(key, ())) == len(symbols.split()):
      for symbol, size in zip(symbols.split(), shapes[key]):
        votes[symbol][size] += 1
  votes["1"] = Counter([1])
  return {symbol: vote.most_common(1)[0][0] for symbol, vote in votes.items()}


def _shape(symbols: str, sizes: Mapping) -> tuple[int | None, ...]:
  return tuple(sizes.get(symbol) for symbol in symbols.split())


def _check_layout(path, layout, sizes, shapes, dtypes) -> None:
  """Lists everything that keeps the file from being what it should be."""
  misshapen, kinds = [], []
  for key in (key for key in layout if key in shapes):
    expected = _shape(layout[key][1], sizes)
    if None not in expected and shapes[key] != expected:
      misshapen.append(f"{key} {shapes[key]} instead of {expected}")
    # Whoever converts all tensors rounds the index too, which nobody uses.
    index = ("I64",) if key.endswith(_INDEX) else ()
    kinds.append(
      tensors.wrong_type(key, dtypes[key], (*index, *tensors.FLOATS))
    )
  problems = {
    "missing": [key for key in layout if key not in shapes],
    "unknown": sorted(shapes.keys() - layout.keys()),
    "wrong shape": misshapen,
    "wrong dtype": list(filter(None, kinds)),
  }
  if not problems["missing"] and not misshapen:
    problems["sizes"] = _contradictions(sizes)
  listed = [
    f"{kind}: {_some(items)}" for kind, items in problems.items() if items
  ]
  if listed:
    raise UserError(
      f"{path} is not in the official DiffiT layout; {'; '.join(listed)}"
    )


def _some(items: list[str]) -> str:
  more = len(items) - _MAX_LISTED
  return ", ".join(items[:_MAX_LISTED]) + (f" and {more} more" * (more > 0))


def _contradictions(sizes: Mapping) -> list[str]:
  """Sizes that cannot belong to one model."""
  if 0 in sizes.values():
    return [f"zero in {sizes}"]
  width, tokens, heads = sizes["width"], sizes["tokens"], sizes["heads"]
  grid = math.isqrt(tokens)
  offsets = (2 * grid - 1) ** 2
  values = sizes["patch"] ** 2 * sizes["channels"]
  rules = {
    f"width {width} is not a multiple of 4 and of {heads} heads": (
      width % 4 == 0 and width % heads == 0
    ),
    f"qkv has {sizes['qkv']} rows, not 3 x {width}": (
      sizes["qkv"] == 3 * width
    ),
    f"{sizes['frequencies']} time frequencies are not an even number": (
      sizes["frequencies"] % 2 == 0
    ),
    f"{tokens} tokens are not a square": tokens == grid**2,
    f"bias tables have {sizes['offsets']} rows, not the {offsets} of"
    f" {grid}x{grid} tokens": sizes["offsets"] == offsets,
    f"{sizes['outputs']} outputs per token, not {values}, or {2 * values}"
    " with variances": sizes["outputs"] in (values, 2 * values),
  }
  return [text for text, holds in rules.items() if not holds]


def _make_model(sizes: Mapping, depth: int, null_label: bool) -> LatentDiffiT:
  values = sizes["patch"] ** 2 * sizes["channels"]
  ratio = sizes["hidden"] / sizes["width"]
  return LatentDiffiT(
    input_size=math.isqrt(sizes["tokens"]) * sizes["patch"],
    patch_size=sizes["patch"],
    channels=sizes["channels"],
    hidden_dim=sizes["width"],
    depth=depth,
    num_heads=sizes["heads"],
    mlp_ratio=int(ratio) if ratio.is_integer() else ratio,
    num_classes=sizes["labels"] - null_label,
    null_label=null_label,
    learn_sigma=sizes["outputs"] == 2 * values,
    frequency_dim=sizes["frequencies"],
  )


def _sizes_of(model: LatentDiffiT) -> dict[str, int]:
  """The inverse of `_make_model`."""
  width = model.hidden_dim
  return {"1": 1} | dict(
    tokens=model.grid**2,
    width=width,
    channels=model.channels,
    patch=model.patch_size,
    frequencies=model.frequency_dim,
    labels=model.num_classes + model.null_label,
    outputs=model.patch_size**2 * model.out_channels,
    offsets=(2 * model.grid - 1) ** 2,
    heads=model.num_heads,
    qkv=3 * width,
    hidden=round(model.mlp_ratio * width),
  )


def _abstract_params(model: LatentDiffiT) -> dict:
  side = model.input_size
  x = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
  one = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
  key = jax.eval_shape(lambda: jax.random.key(0, impl=PRNG))
  variables = jax.eval_shape(
    model.init, key, x, one(jnp.float32), one(jnp.int32)
  )
  return variables["params"]


def _aligned_empty(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
  """Float32, on a 64-byte boundary: jax on CPU then uses it without a copy."""
  raw = np.empty(4 * leaf.size + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + 4 * leaf.size].view(np.float32).reshape(leaf.shape)


def _check_positions(path, tensor, model: LatentDiffiT, dtype: str) -> None:
  ours = sincos_positions(model.hidden_dim, model.grid)
  error = np.abs(tensor[0] - ours).max()
  if not error <= _POSITION_TOLERANCE[dtype]:  # also when it is NaN
    raise UserError(
      f"{path}: pos_embed is not the fixed sin-cos table (off by {error:.2g})"
    )


def _write(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes a safetensors file one tensor at a time.

  The header is the length in 8 bytes, then JSON; tensors follow in its order,
  which is the library's: wider dtypes first, then by name.
  """
  names = {True: ("I64", 8), False: ("F32", 4)}
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for key in sorted(shapes, key=lambda k: (not k.endswith(_INDEX), k)):
    dtype, width = names[key.endswith(_INDEX)]
    begin, end = end, end + width * math.prod(shapes[key])
    header[key] = dict(
      dtype=dtype, shape=shapes[key], data_offsets=(begin, end)
    )
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole.writing(path) as partial, partial.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for key in list(header)[1:]:
        file.write(np.ascontiguousarray(read(key)).data)
  except OSError as error:
    raise UserError(f"writing {path} failed: {error}") from error
