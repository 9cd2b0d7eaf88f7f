"""Snapshots of the power-function averages, and any width made from them.

  <workdir>/snapshots/<step>/ema        {name: average}, float32
  <workdir>/snapshots/<step>/averages   {name: sigma_rel}
  <workdir>/snapshots/<step>/run        what tells one run from another

They are written and read as checkpoints are (`storage`), and never deleted.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import hashlib
import json
import os

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from orbax.checkpoint import checkpoint_managers as orbax_policies

from diffit_jax.errors import UserError
from diffit_jax.parallel import runtime
from diffit_jax.run import ema, identity, posthoc, storage

_FOLDER = "snapshots"
_FEW = 8  # snapshots of a run: below, a warning is due
_LARGE_ERROR = 0.05  # of a profile, beyond which a warning is due


class Snapshots:
  """Writes the snapshots of one run, or does nothing where it wants none."""

  def __init__(
    self, directory: str | os.PathLike, config: config_dict.ConfigDict
  ):
    """Opens or creates `<directory>/snapshots`.

    Args:
      directory: the workdir.
      config: config of the run; snapshot_every_steps=0 is none.

    Raises:
      UserError: the folder holds another run's.
    """
    every, self._folder = config.snapshot_every_steps, None
    if not every:
      return
    self._averages = ema.power_averages(config.ema)
    if config.total_steps < _FEW * every:
      logging.warning(
        "snapshot_every_steps=%d makes few snapshots of %d steps: widths other"
        " than those stored will be far off (docs/ema.md)",
        every,
        config.total_steps,
      )
    self._run = _fingerprint(config)
    folder = storage.absolute(directory) / _FOLDER
    runtime.on_process_0(lambda: self._check_run(folder))
    self._folder = storage.StepFolder(
      folder, orbax_policies.LatestN(None), "snapshot"
    )

  def _check_run(self, folder: epath.Path) -> None:
    for step in storage.list_steps(folder)[-1:]:
      if _read_note(folder, step, "run") != self._run:
        raise UserError(
          f"{folder} holds snapshots of another run: delete or move that"
          " folder, or use another --workdir"
        )

  def has(self, step: int) -> bool:
    """Whether a step is stored; all processes call it together."""
    return self._folder is None or step in self._folder.steps()

  def save(self, step: int, averages: Mapping) -> None:
    """Starts saving the power-function ones among `averages`.

    Does nothing where the step is already there, or the run wants none.

    Args:
      step: steps taken.
      averages: {name: tree}, as in the train state.
    """
    if self._folder is None:
      return
    trees = {name: averages[name] for name in self._averages}
    self._folder.save(
      step,
      {"ema": trees},
      {"averages": self._averages, "run": self._run},
      unit=jax.tree.structure(next(iter(trees.values()))),
    )

  def check(self) -> None:
    """Raises the failure of a save in the background; cheap in every step."""
    if self._folder is not None:
      self._folder.check()

  def wait(self) -> None:
    """Waits for the save under way; raises its failure.

    A checkpoint must wait for the snapshots before it: a run that goes on from
    it never passes their steps again. The one of its own step is made up for
    when the run goes on.
    """
    if self._folder is not None:
      self._folder.wait()

  def close(self) -> None:
    """Waits for the save under way; raises its failure."""
    if self._folder is not None:
      self._folder.close()


def _fingerprint(config: config_dict.ConfigDict) -> str:
  """Digest of the fields that decide a run's numbers."""
  fixed = identity.fixed_fields(identity.resolve(config, None))
  text = json.dumps(fixed, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """An average made from snapshots.

  Attributes:
    params: the tree.
    step: steps taken at its end.
    about: one line on how it was made.
  """

  params: dict
  step: int
  about: str


def reconstruct(
  directory: str | os.PathLike,
  sigma_rel: float,
  abstract,
  step: int | None = None,
) -> Reconstruction:
  """The power-function average of any width, by least squares.

  Holds two trees at a time: the sum and one stored average.

  Args:
    directory: the workdir.
    sigma_rel: relative width.
    abstract: shapes, dtypes and shardings of one average.
    step: a snapshot's, at which the average ends; None is the newest.

  Raises:
    UserError: no snapshots, a width that is none, or a damaged snapshot.
  """
  ema.gamma_of(sigma_rel)  # refuses what is no width
  folder = storage.absolute(directory) / _FOLDER
  stored = runtime.on_process_0(lambda: _stored(folder, step))
  if not stored:
    raise UserError(
      f"{directory} has no snapshots, from which a width such as"
      f" {sigma_rel:g} is made: train with snapshot_every_steps above 0 and"
      " averages of kind='power' (variant ema=power of the configs)"
    )
  last = stored[-1][0]
  profiles = [posthoc.Profile(width, at) for at, _, width in stored]
  wanted = posthoc.Profile(float(sigma_rel), last)
  x = posthoc.combine(profiles, wanted)
  error = posthoc.relative_error(profiles, wanted, x)
  about = (
    f"power-function average with sigma_rel {sigma_rel:g} at step {last}, from"
    f" {np.count_nonzero(x)} stored averages with sigma_rel"
    f" {sorted({p.sigma_rel for p in profiles})}, profile error {error:.2g}"
  )
  logging.info("%s", about)
  if error > _LARGE_ERROR:
    logging.warning(
      "the snapshots are too few for sigma_rel %g: its profile is only reached"
      " within %.0f %% (their weights add up to %.3f); lower"
      " snapshot_every_steps, or ask for a width between those stored",
      sigma_rel,
      100 * error,
      x.sum(),
    )
  total = None
  for weight, tree in _trees(folder, stored, x, abstract):
    total = _add(_zeros(abstract) if total is None else total, tree, weight)
  return Reconstruction(total, last, about)


def _stored(folder: epath.Path, step: int | None) -> list:
  """[step, name, sigma_rel] of every stored average up to `step`."""
  steps = [at for at in storage.list_steps(folder) if step in (None, at)]
  last = max(steps, default=-1)
  found = []
  for at in storage.list_steps(folder):
    if at > last:
      break
    averages = _read_note(folder, at, "averages")
    found += [[at, name, width] for name, width in sorted(averages.items())]
  return found


def _trees(folder, stored, x, abstract) -> Iterator[tuple[np.float32, dict]]:
  """(weight, average) of those that count, one at a time."""
  for (step, name, _), weight in zip(stored, x):
    if not weight:
      continue
    try:
      found = storage.read(
        folder,
        step,
        {"ema": {name: abstract}},
        partial=True,
        unit=jax.tree.structure(abstract),
      )
    except UserError as error:
      raise _damaged(folder, step, error) from error
    yield np.float32(weight), found["ema"][name]


def _read_note(folder: epath.Path, step: int, name: str):
  try:
    return storage.read_note(folder, step, name)
  except (OSError, ValueError) as error:
    raise _damaged(folder, step, error) from error


def _damaged(folder: epath.Path, step: int, error: Exception) -> UserError:
  return UserError(
    f"snapshot {step} cannot be read ({error}): delete {folder / str(step)} to"
    " do without it"
  )


def _zeros(abstract):
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  make = lambda: jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract
  )
  return jax.jit(make, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, tree, weight):
  """total + weight * tree, where `total` was."""
  return jax.tree.map(lambda t, leaf: t + weight * leaf, total, tree)
