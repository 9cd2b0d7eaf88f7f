"""What the page asks of a network: samples, a look inside, the command line.

Everything of JAX is here, and nothing of the page. The samples are those of
`sample`: the same function, compiled for the same batches, so the same bits.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import os
import pathlib
import shlex
import sys
import threading

import numpy as np

from diffit_jax import pictures, ranges, sampling
from diffit_jax.autoencoder.codec import make_codec
from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.evaluation.sets.sampled import names_of_training
from diffit_jax.generation import generator, stepwise, weights
from diffit_jax.generation.labels import choose_labels
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.run import checkpoint
from diffit_jax.stop import Stopped
from diffit_jax.web.attentions import Attentions
from diffit_jax.web.terms import Attention, Progress, Settings, Strip

PARTS, MOST = 4, 16  # batches of one click, between which it can be stopped
_NICENESS = 10  # of the threads that compute, more than of the others


class Studio:
  """One network, and all that the page does with it; safe in any thread.

  Attributes:
    workdir: folder of the run; None for a file.
    title: name and step, in words.
    class_names: one per class; [] without classes.
    solvers: those that sample it.
    averages: names of its averages, and "none".
    defaults: the config's sampler fields.
    has_guide: whether autoguidance can be asked for.
    attentions: what its tokens read, and those of a network beside it.
  """

  def __init__(
    self,
    source: str,
    *,
    is_file: bool,
    vae: str | None = None,
    config=None,
    guide: str | None = None,
    beside: str | None = None,
    data_dir: str | None = None,
  ):
    """Loads the newest weights.

    Args:
      source: a workdir, or a .safetensors file, also on the Hub, if `is_file`.
      is_file: which of the two.
      vae: folder of the VAE of a latent model.
      config: of a file that has none of its own.
      guide: workdir or file of a network that guides.
      beside: workdir or file of one whose attention is shown beside.
      data_dir: folder of the prepared data sets, for the classes' names.

    Raises:
      UserError: as `sample` would.
    """
    self._source, self._config, self._vae = source, config, vae
    self.workdir = None if is_file else pathlib.Path(source)
    self._mesh, self._lock = _make_mesh(), threading.RLock()
    self._made: collections.OrderedDict = collections.OrderedDict()
    loaded = self._load(None, None)
    if is_file:
      self._source = loaded.source  # of the Hub: with the commit it is at now
    self._guide_path, self._guide = guide, None
    if guide:
      self._guide = weights.load_guide(guide, self._mesh, loaded)
      if self._guide.source_sha256:  # of the Hub, likewise
        self._guide_path = self._guide.source
    self.has_guide = guide is not None
    own = loaded.config
    self._codec = make_codec(own, vae)
    self.title = f"{own.name}, step {loaded.step}"
    num, process = own.model.num_classes, kinds.row(own.diffusion).SOLVERS
    names = num and names_of_training(own.data.name, num, data_dir)
    self.class_names = names or [str(i) for i in range(num)]
    self.solvers = [s for s, own in sampling.SOLVERS.items() if process in own]
    self.averages = [*sorted(own.ema), weights.RAW]
    self.defaults = own.sampler.to_dict()
    other = beside and weights.load_guide(
      beside, self._mesh, loaded, flag="beside"
    )
    self.attentions = Attentions(loaded, other, beside)

  def steps(self) -> list[int]:
    """Steps of the finished checkpoints, read anew: a run may train on."""
    return [] if self.workdir is None else checkpoint.list_steps(self.workdir)

  def sample(
    self,
    settings: Settings,
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Iterator[Progress]:
    """Makes the samples in a few batches, the bits of `command`.

    Raises:
      UserError: as `sample` would.
      Stopped: should_stop said so.
    """
    total = settings.num
    if not 1 <= total <= 1024:
      raise UserError(f"--num={total}: a page shows from 1 to 1,024 samples")
    loaded = self._prepared(settings)
    size = self._batch_size(total)
    index = np.arange(total)
    labels = self._labels(loaded, settings, index)
    key = ("generator", loaded.config.to_json_best_effort(), size)
    message = "sampling" if key in self._made else "compiling"
    yield Progress(0, total, message)
    made = []
    for start in range(0, total, size):
      if should_stop():
        raise Stopped
      batch = np.arange(start, start + size)
      with self._lock:
        generate = self._keep(key, lambda: self._generator(loaded))
        images = generate(
          loaded.params,
          settings.seed,
          batch.astype(np.uint32),
          self._labels(loaded, settings, batch),
        )
      made.append(self._visible(images))
      done = min(start + size, total)
      if done < total:
        yield Progress(done, total, "sampling")
    yield Progress(total, total, "done", np.concatenate(made)[:total], labels)

  def command(self, settings: Settings, out: str = "samples") -> str:
    """The command line that makes the same bits."""
    flag = "workdir" if self.workdir else "checkpoint"
    words = [f"--{flag}={self._source}", f"--out={out}"]
    fields = dataclasses.asdict(settings)
    if self.workdir and settings.ema in (None, *self.averages):
      # The newest of today: a run may train on.
      fields["step"] = self._prepared(settings).step
    for name in ("num", "seed", "labels", "ema", "step"):
      if fields[name] is not None:
        words.append(f"--{name}={fields[name]}")
    words.append(f"--batch_size={self._batch_size(settings.num)}")
    for name, value in settings.sampler:
      text = value
      if isinstance(value, (tuple, list)):
        text = ",".join(f"{each:g}" for each in value)
      words.append(f"--{name}={text}")
    words += [f"--vae={self._vae}"] if self._vae else []
    if self._guide_path and "guide_scale" in dict(settings.sampler):
      words.append(f"--guide={self._guide_path}")
    return shlex.join(["python", "-m", "diffit_jax.sample", *words])

  def strip(self, settings: Settings, index: int, columns: int = 8) -> Strip:
    """The clean data predicted at evaluations spread over a sample's way."""
    with self._lock:
      watched, run = self._begin(settings, index)
      spread = np.linspace(0, watched.num_evaluations - 1, columns)
      chosen = np.unique(spread.round().astype(int))
      seen = []
      for i in chosen:
        run = watched.advance(run, int(i))
        seen.append(np.asarray(watched.look(run)[2][:1]))
      images = watched.as_images(np.concatenate(seen))
    return Strip(chosen, watched.levels[chosen], images)

  def attention(
    self,
    settings: Settings,
    index: int,
    evaluation: int,
    block: str,
    token: tuple[int, int],
    head: int | None = None,
  ) -> Attention:
    """What a token of a block reads at an evaluation.

    Args:
      settings: as the sample was made with.
      index: number of the sample.
      evaluation: from 0.
      block: one of `attentions.blocks`.
      token: its row and column, from 0.
      head: one head; None is the mean of all.
    """
    self.attentions.check(block, token, head)
    with self._lock:
      watched, run = self._begin(settings, index)
      last = watched.num_evaluations - 1
      run = watched.advance(run, min(max(evaluation, 0), last))
      x, level, _ = watched.look(run)
      loaded = self._prepared(settings)
      labels = run.labels[:1] if loaded.config.model.num_classes else None
      return self.attentions.read(
        loaded.params, x[:1], level[:1], labels, block, token, head
      )

  def _load(self, ema: str | None, step: int | None) -> weights.Weights:
    if self.workdir is not None:
      return weights.from_workdir(self._source, self._mesh, ema, step)
    return weights.from_file(self._source, self._mesh, ema, self._config)

  def _prepared(self, settings: Settings) -> weights.Weights:
    """The weights, with the settings in their config, refused if wrong."""
    # A run that trains on has a new newest step, and perhaps lost an old one.
    key = ("weights", settings.ema, settings.step, *self.steps()[-1:])
    with self._lock:
      loaded = self._keep(key, lambda: self._load(settings.ema, settings.step))
    config = loaded.config.copy_and_resolve_references()
    with config.unlocked():
      for name, value in settings.sampler:
        ranges.check({name: value}, "sampler", "--")
        config.sampler[name] = value
    return dataclasses.replace(loaded, config=config, guide=self._guide)

  def _labels(self, loaded, settings: Settings, index) -> np.ndarray:
    num = loaded.config.model.num_classes
    return choose_labels(index, settings.seed, num, settings.labels)

  def _batch_size(self, num: int) -> int:
    """A part of the samples, of whole rows on every device."""
    part = min(-(-num // PARTS), MOST)
    return -(-part // self._mesh.size) * self._mesh.size

  def _generator(self, loaded: weights.Weights):
    return generator.make_generator(
      generator.make_model(loaded.config),
      loaded.config,
      self._mesh,
      self._codec,
      loaded.guide,
    )

  def _begin(self, settings: Settings, index: int):
    """(the run in parts, one sample of it before its first evaluation)."""
    loaded = self._prepared(settings)
    watched = self._keep(
      ("stepwise", loaded.config.to_json_best_effort()),
      lambda: stepwise.Stepwise(
        generator.make_model(loaded.config),
        loaded.config,
        self._mesh,
        self._codec,
        loaded.guide,
      ),
    )
    rows = np.full(self._mesh.size, index)
    labels = self._labels(loaded, settings, rows)
    rows = rows.astype(np.uint32)
    return watched, watched.begin(loaded.params, settings.seed, rows, labels)

  def _visible(self, samples: np.ndarray) -> np.ndarray:
    """Samples as uint8; of latents without a VAE their first channels."""
    if samples.dtype == np.uint8:
      return samples
    return np.stack([pictures.stretched(each) for each in samples])

  def _keep(self, key, make: Callable):
    """What `make` makes, made once while it is among the newest."""
    if key not in self._made:
      self._made[key] = make()
    self._made.move_to_end(key)
    while len(self._made) > 12:
      self._made.popitem(last=False)
    return self._made[key]


def _make_mesh():
  """The devices; on Linux the threads that compute on CPUs let others first.

  So the server answers, and a browser on this machine shows it, while batches
  are made. A thread hands its priority on to those that it starts, and JAX
  starts its own with the first look for devices.
  """

  def step_back():
    if sys.platform == "linux":
      where = os.PRIO_PROCESS, threading.get_native_id()
      os.setpriority(*where, os.getpriority(*where) + _NICENESS)

  with futures.ThreadPoolExecutor(1, initializer=step_back) as aside:
    return aside.submit(make_mesh).result()
