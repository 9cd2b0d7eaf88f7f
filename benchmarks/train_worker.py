"""Answers the calls of benchmarks/train_step.py with our own networks.

`python -m benchmarks.train_worker`; see benchmarks/worker.py. A process of its
own, so that its peak memory is its own.
"""

import importlib
import resource

from flax import traverse_util
import jax
from jax.extend import core
import numpy as np
from safetensors.numpy import save_file

from benchmarks import report, worker
from diffit_jax import interop
from diffit_jax.diffusion import kinds
from diffit_jax.environment import PRNG
from diffit_jax.models import latent
from diffit_jax.run import state as state_lib
from diffit_jax.training import objective
from diffit_jax.training import program as program_lib

# Gradients to compare: PyTorch's name, our path, order of PyTorch's axes.
GRADIENTS = {
  "latent_diffit": (
    (
      "blocks.0.attn.relative_position_bias_table",
      "blocks_0/attn/relative_position_bias_table",
      (0, 1),
    ),
    ("blocks.1.mlp.fc1.weight", "blocks_1/mlp/fc1/kernel", (1, 0)),
    ("blocks.0.attn.proj.weight", "blocks_0/attn/proj/kernel", (1, 0)),
    ("t_embedder.mlp.0.weight", "time_embed/fc1/kernel", (1, 0)),
  ),
  "image_diffit": (
    (
      "encoder_0_block_0.block.attn.relative_position_bias_table",
      "encoder_0_block_0/block/attn/relative_position_bias_table",
      (0, 1),
    ),
    (
      "encoder_1_block_0.conv.weight",
      "encoder_1_block_0/conv/kernel",
      (3, 2, 0, 1),
    ),
    ("decoder_0_up.weight", "decoder_0_up/kernel", (3, 2, 0, 1)),
    ("embedding.map_layer0.weight", "embedding/map_layer0/kernel", (1, 0)),
  ),
}


def made_up(shapes) -> dict:
  """Weights under which every parameter matters, unlike fresh ones."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    values = rng.standard_normal(leaf.shape, np.float32)
    if path[-1].key == "kernel":
      is_stacked = path[0].key == "blocks"
      fan_in = np.prod(leaf.shape[1 if is_stacked else 0 : -1])
      return values / np.float32(fan_in**0.5)
    return values / 10 + np.float32(path[-1].key == "scale")

  return jax.tree_util.tree_map_with_path(fill, shapes)


class Network:
  """One config's network and train step."""

  def load(self, config: str, fields: dict) -> dict:
    """Builds configs/`config` (name:variants) with `fields` changed."""
    name, _, variant = config.partition(":")
    module = importlib.import_module(f"configs.{name}")
    self.config = module.get_config(variant or None)
    self.config.update_from_flattened_dict(fields)
    self.program = program_lib.build(self.config)
    self.is_latent = kinds.is_latent(self.config)
    self.diffusion = kinds.make(self.config.diffusion)
    self.state = self.params = None
    self.forward_pass = jax.jit(self._forward)
    self.gradient = jax.jit(jax.value_and_grad(self._drawn_loss))
    model = self.config.model
    return {
      "parameters": sum(x.size for x in jax.tree.leaves(self._shapes)),
      "kept_bytes": self._kept_bytes(),
      "remat": model.remat,
      "dtype": model.dtype,
    }

  @property
  def _shapes(self):
    return self.program.abstract.params

  def _inputs(self) -> dict[str, np.ndarray]:
    """What network and loss of a batch depend on, without random draws."""
    rng = np.random.default_rng(1)
    b, side = self.config.batch_size, self.config.data.resolution
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    image = (b, side, side, self.config.model.channels)
    inputs = {"x": normal(*image), "noise": normal(*image)}
    if self.is_latent:
      t = np.linspace(100, 900, b).astype(np.int64)
      classes = self.config.model.num_classes + 1
      return inputs | {"t": t, "labels": rng.integers(classes, size=b)}
    inputs["sigma"] = np.exp(normal(b) - 1)
    if self.config.model.augment_dim:
      inputs["augment_labels"] = normal(b, self.config.model.augment_dim)
    return inputs

  def _apply(self, params, x, level, inputs):
    extra = {
      name: inputs[name]
      for name in ("labels", "augment_labels")
      if name in inputs
    }
    with jax.default_matmul_precision(self.config.matmul_precision):
      return self.program.model.apply({"params": params}, x, level, **extra)

  def _forward(self, params, inputs):
    if self.is_latent:
      return self._apply(params, inputs["x"], inputs["t"], inputs)
    *_, c_noise = self.diffusion.coefficients(inputs["sigma"])
    return self._apply(params, inputs["x"], c_noise, inputs)

  def _given_losses(self, params, inputs):
    """[b] losses with given draws and without dropout."""
    return self.diffusion.train_losses(
      lambda x, level: self._apply(params, x, level, inputs),
      inputs["x"],
      inputs[self.diffusion.level],
      inputs["noise"],
    )

  def _batch(self) -> dict[str, np.ndarray]:
    """A batch as the pipeline gives it, of noise."""
    rng = np.random.default_rng(0)
    shapes = program_lib.batch_shapes(self.config)
    b = self.config.batch_size
    batch = {
      "label": np.zeros(b, np.int32),
      "index": np.arange(b, dtype=np.uint32),
    }
    if self.is_latent:
      moments = rng.standard_normal(shapes["moments"].shape, np.float32)
      return batch | {"moments": moments}
    return batch | {
      "image": rng.integers(0, 256, shapes["image"].shape, np.uint8)
    }

  def _drawn_loss(self, params, batch):
    """The train step's loss, on no mesh."""
    made = objective.make(self.program.model, self.config)
    draws = made.draws(jax.random.key(0, impl=PRNG), batch)
    with jax.default_matmul_precision(self.config.matmul_precision):
      return made.losses(params, batch, draws).mean()

  def _kept_bytes(self) -> int:
    """What the backward pass finds saved, parameters left out."""
    batch = self._batch()
    backward = lambda params: jax.vjp(
      lambda params: self._drawn_loss(params, batch), params
    )[1]
    jaxpr = jax.make_jaxpr(backward)(self._shapes).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {
      id(var): var.aval.size * var.aval.dtype.itemsize
      for var in jaxpr.outvars
      if isinstance(var, core.Var) and id(var) not in given
    }
    return sum(kept.values())

  def export(self, weights: str, inputs: str, outputs: str, gradient: bool):
    """Writes made-up weights, inputs, and what we make of them."""
    params = made_up(self._shapes)
    if self.is_latent:
      interop.save_official(weights, self.program.model, params)
    else:
      save_file(traverse_util.flatten_dict(params, sep="/"), weights)
    save_file(self._inputs(), inputs)
    self.use(weights=None, params=params)
    out = {"out": self.forward_pass(self.params, self._inputs())}
    if gradient:
      mean = lambda params: self._given_losses(params, self._inputs()).mean()
      out["losses"] = jax.jit(self._given_losses)(self.params, self._inputs())
      found = jax.jit(jax.grad(mean))(self.params)
      if self.config.model.get("scan_blocks"):
        found = latent.unstack_blocks(found)
      found = traverse_util.flatten_dict(found, sep="/")
      for name, path, order in GRADIENTS[self.config.model.name]:
        out[name] = found[path].transpose(order)
    contiguous = {k: np.ascontiguousarray(v) for k, v in out.items()}
    save_file(contiguous, outputs)

  def use(self, weights=None, params=None):
    """Takes the weights for `forward`; made-up ones if none are given."""
    params = made_up(self._shapes) if params is None else params
    self.params = jax.device_put(params)

  def forward(self) -> float:
    return report.seconds(self.forward_pass, self.params, self._inputs())

  def start(self):
    """Makes the state of training; the weights of `forward` are dropped."""
    self.params = None
    self.state = state_lib.create(self.program.init, self.program.mesh)
    self.monitor = state_lib.new_monitor(self.program.mesh)
    self.batch = self._batch()

  def stop(self):
    self.state = None
    worker.give_memory_back()

  def step(self) -> float:
    def run():
      self.state, self.monitor = self.program.train_step(
        self.state, self.monitor, self.batch
      )
      return self.state, self.monitor

    return report.seconds(run)

  def loss_and_gradient(self) -> float:
    return report.seconds(self.gradient, self.state.params, self.batch)

  def peak_bytes(self) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

  def matmul_rate(self) -> float:
    return report.matmul_rate()


def main():
  network = Network()
  names = (
    *("load", "export", "use", "forward", "start", "stop", "step"),
    *("loss_and_gradient", "peak_bytes", "matmul_rate"),
  )
  commands = {name: getattr(network, name) for name in names}
  worker.serve({"version": f"jax {jax.__version__}"}, commands)


if __name__ == "__main__":
  main()
