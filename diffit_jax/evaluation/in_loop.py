"""Scores of a run while it trains, on the code path of `evaluate`.

Each evaluation leaves a card in `<workdir>/evaluation`. A card that is there
is what says that a step was evaluated, so an evaluation that was cut off is
made up for by the next start. Features of the reference are gathered once and
kept beside the cards.
"""

from collections.abc import Callable, Mapping
import os
import pathlib

from absl import logging
from flax import linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from diffit_jax.evaluation import card, job
from diffit_jax.evaluation import measure as measure_lib
from diffit_jax.evaluation.collector import Collector, Stopped
from diffit_jax.evaluation.features import spaces
from diffit_jax.evaluation.metrics import scores
from diffit_jax.evaluation.sets import references as reference_lib
from diffit_jax.evaluation.sets.samples import NetworkSamples, sample_shape
from diffit_jax.generation import weights
from diffit_jax.parallel import runtime
from diffit_jax.parallel.mesh import replicated

_PER_DEVICE = 32  # images of a call, at most
# CHOICE: not the seed 0 of the sample grids and of `sample`: scores that choose
# a checkpoint are then not those of the samples that it is published with.
_SEED = 1_000_003


class Evaluator:
  """Scores the weights of one run.

  Attributes:
    folder: of the cards.
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
      config: of the run; `config.evaluation` says what is measured.
      mesh: of the devices.
      codec: decodes the latents of a latent model.
      should_stop: asked after every batch; says the same in all processes.
      check_claim: see `Collector`.
      directory: the workdir.
      inception: safetensors file of Inception's weights, where they are needed.
      data_dir: of the prepared data sets.
    """
    options = config.evaluation
    self.folder = pathlib.Path(directory) / "evaluation"
    self._config, self._num = config, options.num
    self._metrics = scores.choose(options.metrics, options.features)
    self._reference = reference_lib.read_reference(
      options.reference or config.data.name, data_dir, config.data.split
    )
    space = spaces.open_space(options.features, inception)
    self._collector = Collector(
      space,
      mesh,
      batch_size=min(_PER_DEVICE * mesh.size, options.num),
      should_stop=should_stop,
      check_claim=check_claim,
    )
    self._gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    self._make_samples = lambda loaded: NetworkSamples(
      loaded, model, mesh, seed=_SEED, labels="random", codec=codec
    )
    self._samples = self._measure = None
    measure_lib.check_fit(
      self._collector, self._reference, sample_shape(config, codec)
    )

  def find(self, step: int) -> dict[str, float]:
    """What a step scored in this or an earlier start; {} for nothing.

    A card of an earlier start that scored something else counts for nothing.
    """
    path = self._card(step)

    def read() -> dict[str, float]:
      if not path.exists():
        return {}
      found = card.read(path)
      done = {*found["metrics"], *found["not_computed"]}
      is_same = found["num_samples"] == self._num and {*self._metrics} <= done
      return found["metrics"] if is_same else {}

    return runtime.from_first(read)

  def __call__(
    self, step: int, averages: Mapping[str, dict], params: dict
  ) -> dict[str, float] | None:
    """Scores the weights of a step.

    Args:
      step: number of steps taken.
      averages: {name: parameters}; the first is scored.
      params: scored where there are no averages.

    Returns:
      {metric: value}, or None where SIGTERM came first.
    """
    name = weights.default_average(self._config)
    tree = params if name == weights.RAW else averages[name]
    loaded = weights.Weights(
      self._gather(tree), self._config, step, name, f"training, step {step}"
    )
    logging.info("scoring %d samples of step %d", self._num, step)
    try:
      return self._score(loaded)["metrics"]
    except Stopped:
      return None

  def _score(self, loaded: weights.Weights) -> dict:
    if self._samples is None:
      self._samples = self._make_samples(loaded)
    else:
      self._samples = self._samples.with_weights(loaded)
    self.folder.mkdir(parents=True, exist_ok=True)
    if self._measure is None:
      self._measure = measure_lib.make_measure(
        self._collector,
        self._reference,
        self._samples.shape,
        wanted=self._metrics,
        partial=self.folder / "reference",
      )
    return job.evaluate_to_file(
      self._measure,
      self._samples,
      self._card(loaded.step),
      num=self._num,
      repeats=1,
    )

  def _card(self, step: int) -> pathlib.Path:
    return self.folder / f"step_{step:08d}.json"
