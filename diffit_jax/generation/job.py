"""Sampling into a folder: files, a grid and an npz; stop and go on any time.

What is there counts where sampling.json says that it was made with the same
settings; samples that are damaged are made anew.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import itertools
import json
import os
import pathlib

from absl import logging
from jax.sharding import Mesh
import numpy as np

from diffit_jax import claim, whole
from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.generation import description, generator
from diffit_jax.generation.labels import choose_labels
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.generation.output import (
  IMAGES,
  LATENTS,
  Output,
  Unreadable,
)
from diffit_jax.generation.weights import Weights
from diffit_jax.parallel.mesh import check_batch
from diffit_jax.progress import Progress
from diffit_jax.settings import differences
from diffit_jax.stop import Stopped, StopRequest


@dataclasses.dataclass(frozen=True)
class Result:
  """Paths of what was written; `grid` is None for latents."""

  grid: pathlib.Path | None
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
  codec=None,
) -> Result:
  """Makes samples 0..num-1 that are not in the folder yet.

  The batches of one `num` and `batch_size` always hold the same indices, so
  that an interrupted run ends with the same bits as an undisturbed one.

  Args:
    weights: the network's, with the config that says how to sample.
    mesh: the devices.
    out: folder; created where missing.
    num: samples wanted in all.
    seed: sample i depends on (seed, i).
    labels: see `choose_labels`.
    batch_size: samples per call, over all devices.
    codec: decodes the latents of a latent model; without it, they are written.

  Returns:
    The paths.

  Raises:
    Stopped: SIGTERM came first; what was made stays.
  """
  batch_size = min(batch_size, -(-num // mesh.size) * mesh.size)
  check_batch(mesh, batch_size, "batch_size")
  config, model = weights.config, generator.make_model(weights.config)
  generate = generator.make_generator(
    model, config, mesh, codec, weights.guide
  )
  classes = lambda index: choose_labels(index, seed, model.num_classes, labels)
  classes(np.arange(1))  # refuses wrong labels before anything is written
  is_latent = kinds.is_latent(config) and codec is None
  output = Output(
    pathlib.Path(out),
    LATENTS if is_latent else IMAGES,
    generator.sample_shape(config, codec),
  )
  settings = description.describe(weights, seed, labels, codec)
  generate_batch = lambda index: generate(
    weights.params, seed, index.astype(np.uint32), classes(index)
  )
  classes_of_all = classes(np.arange(num)) if model.num_classes else None
  place = output.folder / ".sampling.claim"
  with claim.exclusive(place, "--out", output.folder) as held:
    _begin(output, settings)
    waiting = output.missing(num)
    logging.info(
      "sampling %d %s (%d there already) from %s, ema %s",
      num,
      output.kind.name,
      num - len(waiting),
      weights.source,
      weights.ema,
    )
    if waiting:
      _report_skipped(weights, mesh, seed, classes)
    make = lambda waiting: _make(
      output, generate_batch, waiting, batch_size, num, held
    )
    return _make_all(output, make, waiting, num, classes_of_all, held)


def _make_all(
  output: Output,
  make: Callable[[list[int]], None],
  waiting: list[int],
  num: int,
  classes: np.ndarray | None,
  held: claim.Claim,
) -> Result:
  """Makes the samples that wait, and once more those that turn out damaged."""
  for is_last in (False, True):
    make(waiting)
    held.check()
    try:
      return Result(*output.finish(num, classes))
    except OSError as error:
      raise _cannot_write(output.folder, error) from error
    except Unreadable as error:
      if is_last:
        raise UserError(
          f"a sample that was just written to {output.folder} is {error}: check"
          " that disk, then run the same command again"
        ) from error
    waiting = output.missing(num, is_thorough=True)


def _make(
  output: Output,
  generate_batch: Callable[[np.ndarray], np.ndarray],
  waiting: list[int],
  batch_size: int,
  num: int,
  held: claim.Claim,
) -> None:
  """Makes the samples that wait, in whole batches, or raises Stopped."""
  batches = itertools.groupby(waiting, lambda i: i // batch_size)
  with (
    StopRequest() as stop,
    Progress(num, "sampling", "images", num - len(waiting)) as progress,
    futures.ThreadPoolExecutor(4) as pool,
  ):
    for batch, wanted in batches:
      if stop.requested:
        raise Stopped
      index = np.arange(batch * batch_size, (batch + 1) * batch_size)
      samples = generate_batch(index)
      held.check()
      progress.update(_write_batch(output, pool, index, samples, [*wanted]))


def _write_batch(output: Output, pool, index, samples, wanted) -> int:
  """Writes the samples of a batch that are wanted; returns how many."""
  write: Callable = lambda i: output.write(i, samples[i - index[0]])
  try:
    list(pool.map(write, wanted))
  except OSError as error:
    raise _cannot_write(output.folder, error) from error
  return len(wanted)


def _report_skipped(weights: Weights, mesh: Mesh, seed: int, classes) -> None:
  """Says how much of guidance is left out, and what that changes.

  With a tolerance above 0, a few samples are made both ways and compared.
  """
  config = weights.config
  options = SamplerOptions.from_config(config)
  total, skipped = options.num_evaluations()
  if options.guidance.is_off or not skipped:
    return
  tolerance = options.guidance.tolerance
  logging.info(
    "guidance: %d of %d unconditional evaluations are skipped, where the scale"
    " is within %g of 1",
    skipped,
    total,
    tolerance,
  )
  if not tolerance:
    return
  model, index = generator.make_model(config), np.arange(mesh.size)
  made = []
  for value in (0.0, tolerance):
    config = config.copy_and_resolve_references()
    config.sampler.guidance_tolerance = value
    generate = generator.make_generator(
      model, config, mesh, guide=weights.guide
    )
    samples = generate(
      weights.params, seed, index.astype(np.uint32), classes(index)
    )
    made.append(samples.astype(np.float64))
  logging.info(
    "guidance: the largest change that this makes in %d samples is %.3g, of"
    " values with standard deviation %.3g",
    len(index),
    np.abs(made[1] - made[0]).max(),
    made[0].std(),
  )


def _begin(output: Output, settings: dict) -> None:
  """Writes sampling.json, or refuses a folder of other or unknown samples."""
  folder, path = output.folder, output.folder / "sampling.json"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(output, _read_settings(path), settings)
    with whole.writing(path) as partial:
      partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
  except OSError as error:
    raise _cannot_write(folder, error) from error


def _check_settings(output: Output, old: dict | None, new: dict) -> None:
  """Refuses samples that were made otherwise, or nobody knows how."""
  if old is None:
    if strays := output.strays():
      raise UserError(
        f"{output.folder} holds samples"
        f" ({strays[0].relative_to(output.folder)}) and no readable"
        " sampling.json that says how they were made: use another --out or"
        " delete it"
      )
    return
  decisive = lambda said: {k: said.get(k) for k in new if k != "about"}
  different = differences(decisive(old), decisive(new))
  if different:
    raise UserError(
      f"{output.folder} holds samples of other settings"
      f" ({'; '.join(different)}): use another --out or delete it"
    )


def _read_settings(path: pathlib.Path) -> dict | None:
  """What sampling.json says; None where there is none, or a damaged one."""
  try:
    found = json.loads(path.read_bytes())
  except (FileNotFoundError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def _cannot_write(folder: pathlib.Path, error: OSError) -> UserError:
  return UserError(
    f"cannot write to --out={folder}: {error}; what is there stays, and the"
    " same command goes on from it"
  )
