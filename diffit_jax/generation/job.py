"""Sampling into a folder: PNGs, a grid and an npz; stop and go on any time."""

from concurrent import futures
import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile

from absl import logging
from flax import traverse_util
import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.generation import generator
from diffit_jax.generation.weights import Weights
from diffit_jax.parallel.mesh import check_batch
from diffit_jax.progress import Progress
from diffit_jax.sampling.images import page, write_png
from diffit_jax.stop import StopRequest


@dataclasses.dataclass(frozen=True)
class Result:
  """Paths of what was written."""

  grid: pathlib.Path
  npz: pathlib.Path


def sample_to_folder(
  weights: Weights,
  mesh: Mesh,
  out: str | os.PathLike,
  *,
  num: int,
  seed: int,
  labels: str = "random",
  batch_size: int = 64,
) -> Result | None:
  """Samples images 0..num-1 that are not in the folder yet.

  Batches always hold the same indices, so that an interrupted run ends with the
  same bits as an undisturbed one.

  Args:
    weights: the network's, with the config that says how to sample.
    mesh: the devices.
    out: folder; created where missing.
    num: images wanted in all.
    seed: sample i depends on (seed, i).
    labels: see `generator.choose_labels`.
    batch_size: images per call, over all devices.

  Returns:
    The paths, or None where SIGTERM came first.
  """
  batch_size = min(batch_size, -(-num // mesh.size) * mesh.size)
  check_batch(mesh, batch_size, "batch_size")
  config, model = weights.config, models.make_model(weights.config.model)
  generate = generator.make_generator(model, config, mesh)
  classes = lambda index: generator.choose_labels(
    index, seed, model.num_classes, labels
  )
  classes(np.arange(1))  # refuses wrong labels before anything is written
  folder = pathlib.Path(out)
  _claim(folder, _settings(weights, seed, labels))

  image_path = lambda i: folder / "images" / f"{i:06d}.png"
  waiting = [i for i in range(num) if not image_path(i).exists()]
  batches = sorted({i // batch_size for i in waiting})
  logging.info(
      "sampling %d images (%d there already) from %s, ema %s",
      num, num - len(waiting), weights.source, weights.ema,
  )  # fmt: skip
  with (
    StopRequest() as stop,
    Progress(num, "sampling", "images", num - len(waiting)) as progress,
    futures.ThreadPoolExecutor(4) as pool,
  ):
    for batch in batches:
      if stop.requested:
        return None
      index = np.arange(batch * batch_size, (batch + 1) * batch_size)
      images = generate(
        weights.params, seed, index.astype(np.uint32), classes(index)
      )
      images = np.asarray(images)
      wanted = [i for i in index if i < num and not image_path(i).exists()]
      list(pool.map(
          lambda i, images=images, start=index[0]: write_png(
              image_path(i), images[i - start]
          ),
          wanted,
      ))  # fmt: skip
      progress.update(len(wanted))
  return _finish(
    folder, image_path, num, classes if model.num_classes else None
  )


def _settings(weights: Weights, seed: int, labels: str) -> dict:
  """What decides the pixels, as it stands in sampling.json."""
  sampler = dict(weights.config.sampler)
  sampler.pop("num_grid", None)
  return {
    "weights_sha256": hash_tree(weights.params),
    "step": weights.step,
    "ema": weights.ema,
    "seed": seed,
    "labels": labels,
    "sampler": sampler,
    "dtype": weights.config.model.dtype,
    "matmul_precision": weights.config.matmul_precision,
  }


def hash_tree(tree) -> str:
  """SHA-256 over names and bytes of all leaves, in order of name."""
  digest = hashlib.sha256()
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  for name in sorted(flat):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(jax.device_get(flat[name])).data)
  return digest.hexdigest()


def _claim(folder: pathlib.Path, settings: dict) -> None:
  """Writes sampling.json, or refuses a folder of other settings."""
  path = folder / "sampling.json"
  if path.exists():
    try:
      old = json.loads(path.read_text())
    except ValueError:
      old = {}
    different = [key for key in settings if old.get(key) != settings[key]]
    if different:
      raise UserError(
        f"{folder} holds samples of other settings"
        f" ({', '.join(different)} differ): use another --out or delete it"
      )
  try:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    partial = folder / "sampling.json.partial"
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)
  except OSError as error:
    raise UserError(f"cannot write to --out={folder}: {error}") from error


def _finish(folder, image_path, num, classes) -> Result:
  first = [_read_png(image_path(i)) for i in range(min(num, 100))]
  write_png(folder / "grid.png", page(np.stack(first)))
  height, width = first[0].shape[:2]
  npz = folder / f"samples_{num}x{height}x{width}x3.npz"
  _write_npz(npz, image_path, num, classes and classes(np.arange(num)))
  return Result(folder / "grid.png", npz)


def _read_png(path: pathlib.Path) -> np.ndarray:
  from PIL import Image

  image = np.asarray(Image.open(path))
  return image if image.ndim == 3 else image[..., None]


def _write_npz(path, image_path, num: int, labels: np.ndarray | None) -> None:
  """arr_0 uint8 [n, h, w, 3] and arr_1 labels, image by image."""
  shape = (num, *_read_png(image_path(0)).shape[:2], 3)
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  partial = path.with_name(path.name + ".partial")
  with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
      np.lib.format.write_array_header_1_0(file, header)
      for i in range(num):
        image = np.broadcast_to(_read_png(image_path(i)), shape[1:])
        file.write(image.tobytes())
    if labels is not None:
      with archive.open("arr_1.npy", "w") as file:
        np.lib.format.write_array(file, labels.astype(np.int64))
  os.replace(partial, path)
