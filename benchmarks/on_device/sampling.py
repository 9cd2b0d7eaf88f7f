"""Stage `sampling`: guided samples of imagenet256's network, by solver.

Made-up weights, the config's guidance, both halves of it in one batch. The
latents are not decoded: see stage `vae`.
"""

import functools
import time

import jax
import jax.numpy as jnp

from benchmarks.on_device import device, rows
from diffit_jax import models, sampling
from diffit_jax.diffusion.guidance import Guidance
from diffit_jax.environment import PRNG
from diffit_jax.generation import generator
from diffit_jax.generation.options import SamplerOptions
from diffit_jax.training import program as program_lib

card = device.card

# (solver, steps, guidance_tolerance, attention), in the order of their worth.
CASES = (
  ("ddpm", 250, 0.0, "xla"),
  ("ddpm", 250, 1e-3, "xla"),
  ("ddim", 50, 0.0, "xla"),
  ("dpmpp_2m", 25, 0.0, "xla"),
  ("ddim", 50, 0.0, "cudnn"),
)
ONCE = 100  # steps from which a run is long enough to be timed once
TINY_STEPS = 3


def measure(record: rows.Record) -> None:
  sampler = Sampler(record.is_tiny)
  for solver, steps, tolerance, attention in CASES:
    steps = TINY_STEPS if record.is_tiny else steps
    about = {
      "steps": steps,
      "guidance_tolerance": tolerance,
      "attention": attention,
      "batch": sampler.batch,
      "precision": "bfloat16",
    }
    if reason := device.attentions()[attention]:
      record.add(solver, **about, skipped=reason)
      continue
    run = functools.partial(sampler.times, solver, steps, tolerance, attention)
    record.attempt(solver, run, least=15, **about)
  about = {"attention": "xla", "batch": sampler.batch, "precision": "bfloat16"}
  record.attempt("network", sampler.forward, **about)


class Sampler:
  """The network with noise and labels for a batch of samples."""

  def __init__(self, is_tiny: bool):
    tiny = device.TINY if is_tiny else {}
    self.config = device.read_config("imagenet256", **tiny)
    self.batch = 2 if is_tiny else 32
    self.model = models.make_model(self.config.model)
    side = self.config.data.resolution
    init = lambda: program_lib.init_params(self.model, side, 0)
    shapes = jax.eval_shape(init)
    self.macs = program_lib.forward_macs(self.model, shapes, side).total
    self.params = jax.jit(lambda: device.made_up(shapes))()
    key = lambda seed: jax.random.key(seed, impl=PRNG)
    self.noise = jax.random.normal(key(0), (self.batch, side, side, 4))
    self.labels = jnp.arange(self.batch) % self.config.model.num_classes
    self.keys = jax.random.split(key(1), self.batch)

  def times(
    self, solver: str, steps: int, tolerance: float, attention: str
  ) -> dict:
    """Columns of one solver's row."""
    config = self.config.copy_and_resolve_references()
    config.sampler.update(
      solver=solver, steps=steps, guidance_tolerance=tolerance
    )
    options = SamplerOptions.from_config(config)
    model = self.model.clone(attention=attention)

    def run(params, noise, labels, keys):
      with jax.default_matmul_precision(config.matmul_precision):
        network = generator.make_network(model, params, config)
        guided = lambda rule: rule.denoiser(network, labels, model.num_classes)
        return sampling.sample(
          guided(options.guidance),
          options.solver,
          noise,
          keys=keys,
          plain=guided(Guidance()),
          skip=options.guidance.skippable,
          **options.solver_options,
        )

    args = self.params, self.noise, self.labels, self.keys
    program, about = device.compiled(jax.jit(run), *args)
    s, x = timed(functools.partial(program, *args), once=steps >= ONCE)
    num, num_skipped = options.num_evaluations()
    evaluations = 2 * num - num_skipped  # of the network, per sample
    return {
      "evaluations": evaluations,
      **self._rates(s, evaluations),
      **about,
      **device.peak_gib(),
      "is finite": bool(jnp.isfinite(x).all()),
    }

  def forward(self) -> dict:
    """Columns of one evaluation of the network, without guidance."""
    run = lambda params, x, t, labels: self.model.apply(
      {"params": params}, x, t, labels
    )
    args = self.params, self.noise, jnp.full(self.batch, 500), self.labels
    program, about = device.compiled(jax.jit(run), *args)
    s = device.seconds(functools.partial(program, *args))
    return {"evaluations": 1, **self._rates(s, 1), **about}

  def _rates(self, s: float, evaluations: int) -> dict:
    rate = self.batch / s
    flops = 2 * self.macs * evaluations * rate
    return {"s": s, "images/s": rate, "model TFLOP/s": flops / 1e12}


def timed(call, once: bool) -> tuple[float, jax.Array]:
  """Seconds and result; a long run has no other before it that is not timed."""
  if not once:
    return device.seconds(call, rounds=2), call()
  start = time.perf_counter()
  x = jax.block_until_ready(call())
  return time.perf_counter() - start, x
