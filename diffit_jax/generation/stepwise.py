"""A look inside while samples are made: what the network sees and says.

The evaluations of a run (`sampling.scan`) are made in parts, and in between
there is time to look. As another program than the generator's, it rounds
otherwise: the samples themselves come from there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.sharding import Mesh
import numpy as np

from diffit_jax import sampling
from diffit_jax.diffusion import kinds
from diffit_jax.generation import generator
from diffit_jax.parallel.sharding import batch_sharding, place, replicated
from diffit_jax.pictures import to_uint8
from diffit_jax.sampling import scan


class Run(NamedTuple):
  """Samples under way, after `done` evaluations."""

  params: Any
  keys: jax.Array
  labels: jax.Array
  carry: Any
  done: int


class Stepwise:
  """The solver's run of a config, in parts.

  Attributes:
    num_evaluations: evaluations of a run.
    levels: [num_evaluations] noise levels.
  """

  def __init__(
    self, model: nn.Module, config: Mapping, mesh: Mesh, codec=None, guide=None
  ):
    """Arguments as in `generator.make_generator`."""
    self._recipe = generator.Recipe.make(model, config, mesh, guide)
    self._config, self._codec, self._mesh = config, codec, mesh
    options = self._recipe.options
    self._solver = sampling.make_solver(
      options.solver, **options.solver_options
    )
    self._stretches = scan.stretches(self._solver, options.guidance.skippable)
    self.num_evaluations = self._solver.num_evaluations
    self.levels = np.asarray(self._solver.levels)
    whole, split = replicated(mesh), batch_sharding(mesh)
    self._begin = jax.jit(
      self._start,
      in_shardings=(whole, split),
      out_shardings=(split, split),
    )
    self._advance = jax.jit(self._part, static_argnames="is_skipped")
    self._look = jax.jit(self._see)

  def begin(self, params, seed: int, index, labels) -> Run:
    """Samples of [b] indices and labels, before the first evaluation."""
    split = batch_sharding(self._mesh)
    index, labels = (place(x, split) for x in (index, labels))
    carry, keys = self._begin(seed, index)
    return Run(params, keys, labels, carry, 0)

  def advance(self, run: Run, stop: int) -> Run:
    """The same samples after `stop` evaluations in all."""
    carry = run.carry
    for first, last, is_skipped in self._stretches:
      start, end = max(first, run.done), min(last, stop)
      if start < end:
        carry = self._advance(
          *(run.params, self._recipe.guide_params, carry, run.keys, run.labels),
          np.int32(start),
          np.int32(end),
          is_skipped=is_skipped,
        )
    return run._replace(carry=jax.block_until_ready(carry), done=stop)

  def look(self, run: Run) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the next evaluation sees and says: (x, level [b], clean data)."""
    return self._look(
      *(run.params, self._recipe.guide_params, run.carry, run.keys),
      run.labels,
      np.int32(run.done),
    )

  def as_images(self, x: np.ndarray) -> np.ndarray:
    """uint8 images of states or predictions; of latents' channels undecoded."""
    if kinds.is_latent(self._config) and self._codec is not None:
      return generator.as_made(np.asarray(x), self._config, self._codec)
    return np.asarray(to_uint8(np.asarray(x)))

  def _start(self, seed, index):
    noise, keys = self._recipe.noise_and_keys(seed, index)
    return self._solver.start(noise), keys

  def _around(self, params, guide_params, carry, keys, labels):
    """The solver's own arguments: (guided, plain), like, draw."""
    like = jax.eval_shape(self._solver.finish, carry)
    draw = scan.drawer(self._solver, like, keys)
    both = self._recipe.denoisers(params, guide_params, labels)
    return both, like, draw

  def _part(
    self, params, guide_params, carry, keys, labels, start, stop, is_skipped
  ):
    with self._precision():
      (guided, plain), like, draw = self._around(
        params, guide_params, carry, keys, labels
      )
      denoiser = plain if is_skipped else guided
      return scan.advance(
        denoiser, self._solver, like, draw, carry, start, stop
      )

  def _see(self, params, guide_params, carry, keys, labels, i):
    with self._precision():
      (guided, _), like, draw = self._around(
        params, guide_params, carry, keys, labels
      )
      return scan.look(guided, self._solver, like, draw, carry, i)

  def _precision(self):
    return jax.default_matmul_precision(self._config["matmul_precision"])
