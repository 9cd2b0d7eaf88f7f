"""Scores of a run while it trains, by the same code as `evaluate`.

Each evaluation leaves a card in `<workdir>/evaluation`. The card tells that a
step was evaluated; so an evaluation that was interrupted is made again at the
next start. Features of the reference are gathered once and kept beside the
cards.
"""

from collections.abc import Callable, Mapping
import os
import pathlib

from absl import logging
from flax import linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax.evaluation import card, scoring
from diffit_jax.evaluation import measure as measure_lib
from diffit_jax.evaluation.collector import Collector
from diffit_jax.evaluation.features import spaces
from diffit_jax.evaluation.metrics import table
from diffit_jax.evaluation.sets import references
from diffit_jax.evaluation.sets.network_samples import (
  NetworkSamples,
  sample_shape,
)
from diffit_jax.generation import weights
from diffit_jax.generation.generator import make_generator
from diffit_jax.parallel import runtime
from diffit_jax.parallel.sharding import replicated

_PER_DEVICE = 32  # images of a call, at most
# CHOICE: not the seed 0 of the sample grids and of `sample`: scores that choose
# a checkpoint are then not those of the samples that it is published with.
_SEED = 1_000_003


class RunScorer:
  """Scores the weights of one run.

  Attributes:
    folder: folder of the cards.
  """

  def __init__(
    self,
    model: nn.Module,
    config: config_dict.ConfigDict,
    mesh: Mesh,
    codec,
    should_stop: Callable[[], bool],
    check_claim: Callable[[], None],
    *,
    directory: str | os.PathLike,
    inception: str | None,
    data_dir: str | None,
  ):
    """Refuses what cannot be scored; gathers nothing yet.

    Args:
      model: the network.
      config: the run's; `config.evaluation` says what is measured.
      mesh: the devices.
      codec: decodes the latents of a latent model.
      should_stop: asked after every batch; answers the same in all processes.
      check_claim: see `Collector`.
      directory: the workdir.
      inception: safetensors file of Inception's weights, if they are needed.
      data_dir: folder of the prepared data sets.
    """
    options = config.evaluation
    self.folder = pathlib.Path(directory) / card.FOLDER
    self._config, self._num = config, options.num
    self._metrics = table.choose(options.metrics, options.features)
    self._reference = references.read_reference(
      options.reference or config.data.name, data_dir, config.data.split
    )
    self._collector = Collector(
      spaces.open_space(options.features, inception),
      mesh,
      batch_size=min(_PER_DEVICE * mesh.size, options.num),
      should_stop=should_stop,
      check_claim=check_claim,
    )
    self._measure = None
    self._shape = sample_shape(config, codec)
    measure_lib.check_fit(self._collector, self._reference, self._shape)
    self._gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    generate = make_generator(model, config, mesh, codec)
    self._make_samples = lambda loaded: NetworkSamples(
      loaded, model, generate, seed=_SEED, labels="random", codec=codec
    )

  def find(self, step: int) -> dict[str, float]:
    """Scores of a step from this or an earlier start; {} if there are none.

    A card of an earlier start with other metrics or another number of samples
    does not count.
    """
    path = self._card_path(step)

    def read() -> dict[str, float]:
      found = card.read(path) if path.exists() else None
      if found and card.has(found, self._num, self._metrics):
        return found["metrics"]
      return {}

    return runtime.on_process_0(read)

  def __call__(
    self, step: int, averages: Mapping[str, dict], params: dict
  ) -> dict[str, float]:
    """Scores the weights of a step.

    Args:
      step: number of steps taken.
      averages: {name: parameters}; the first is scored.
      params: scored if there are no averages.

    Returns:
      {metric: value}.

    Raises:
      Stopped: SIGTERM came first.
    """
    name = weights.default_average(self._config)
    tree = params if name == weights.RAW else averages[name]
    loaded = weights.Weights(
      self._gather(tree), self._config, step, name, f"training, step {step}"
    )
    logging.info("scoring %d samples of step %d", self._num, step)
    return self._score(loaded)["metrics"]

  def _score(self, loaded: weights.Weights) -> dict:
    self.folder.mkdir(parents=True, exist_ok=True)
    if self._measure is None:
      self._measure = measure_lib.make_measure(
        self._collector,
        self._reference,
        self._shape,
        wanted=self._metrics,
        partial=self.folder / "reference",
      )
    samples, path = self._make_samples(loaded), self._card_path(loaded.step)
    return scoring.evaluate_to_file(self._measure, samples, path, num=self._num)

  def _card_path(self, step: int) -> pathlib.Path:
    return card.path_of_step(self.folder, step)
