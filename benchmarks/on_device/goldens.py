"""Stage `goldens`: the device's numbers beside float64 on the CPU.

Latent models with made-up weights, a small one and XL/2 of depth 4: output,
loss, gradient of all parameters, and that of the attention's bias, which fused
kernels get wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_device import device, rows
from diffit_jax.diffusion import adm
from diffit_jax.models import LatentDiffiT, latent

card = device.card

NETWORKS = {
  "small": dict(
    input_size=16, hidden_dim=144, depth=4, num_heads=2, num_classes=10
  ),
  "XL/2, depth 4": dict(
    input_size=32, hidden_dim=1152, depth=4, num_heads=16, num_classes=1000
  ),
}
# Case -> (dtype of the blocks, precision of products, fields of the model).
CASES = {
  "float32, highest": (jnp.float32, "highest", {}),
  "float32, high": (jnp.float32, "high", {}),
  "float32, default": (jnp.float32, "default", {}),
  "bfloat16": (jnp.bfloat16, "default", {}),
  "bfloat16, cudnn": (jnp.bfloat16, "default", {"attention": "cudnn"}),
  "float32, highest, unrolled": (
    jnp.float32,
    "highest",
    {"scan_blocks": False},
  ),
}


def measure(record: rows.Record) -> None:
  for network in ("small",) if record.is_tiny else NETWORKS:
    measure_network(record, network)


def measure_network(record: rows.Record, network: str) -> None:
  """One row for each case."""
  model = LatentDiffiT(**NETWORKS[network])
  params, inputs = make_inputs(model)
  run = jax.jit(outputs, static_argnums=(0, 1))
  to_64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  cpu = jax.devices("cpu")[0]
  with jax.enable_x64(True), jax.default_device(cpu):
    wide = inputs | {name: to_64(inputs[name]) for name in ("x", "noise")}
    exact = run(model.clone(dtype=jnp.float64), "highest", to_64(params), wide)
    exact = to_64(exact)
  for name, (dtype, precision, fields) in CASES.items():
    reason = device.attentions()[fields.get("attention", "xla")]
    if reason:
      record.add(name, network=network, skipped=reason)
      continue
    compare = functools.partial(
      errors, run, model.clone(dtype=dtype, **fields), precision, params,
      inputs, exact,
    )  # fmt: skip
    record.attempt(name, compare, network=network)


def make_inputs(model: LatentDiffiT) -> tuple[dict, dict]:
  """Weights and a batch, float32, all drawn by numpy."""
  rng = np.random.default_rng(0)
  shape = (4, model.input_size, model.input_size, 4)
  init = lambda: model.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(4))

  def fill(leaf):
    fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 100
    values = rng.standard_normal(leaf.shape) * fan_in**-0.5
    return values.astype(np.float32)

  params = jax.tree.map(fill, jax.eval_shape(init)["params"])
  inputs = {
    name: rng.standard_normal(shape, np.float32)
    for name in ("x", "noise")
  }
  inputs["t"] = np.array([3, 250, 700, 999], np.int32)
  inputs["labels"] = np.array([0, 3, 9, 10], np.int32)
  return params, inputs


def outputs(model: LatentDiffiT, precision: str, params, inputs) -> dict:
  """What is compared."""
  x, t, noise = inputs["x"], inputs["t"], inputs["noise"]

  def loss(params):
    with jax.default_matmul_precision(precision):
      out = model.apply({"params": params}, x, t, inputs["labels"])
    return adm.make_schedule().losses(out, x, t, noise)["loss"].mean(), out

  (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  return {"output": out, "loss": value, "gradient": gradient}


def errors(run, model, precision, params, inputs, exact: dict) -> dict:
  """Relative errors of one form of the network."""
  if not model.scan_blocks:
    params = latent.unstack_blocks(params)
  found = dict(run(model, precision, params, inputs))
  if not model.scan_blocks:
    found["gradient"] = latent.stack_blocks(jax.device_get(found["gradient"]))
  off = {name: distance(found[name], exact[name]) for name in exact}
  off["d(bias)"] = distance(*map(bias, (found["gradient"], exact["gradient"])))
  return off


def bias(gradient: dict):
  """Of the table of each block's attention."""
  return gradient["blocks"]["attn"]["relative_position_bias_table"]


def distance(a, b) -> float:
  """Norm of the difference of two trees over that of the second."""
  flat = lambda tree: np.concatenate(
    [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
  )
  a, b = flat(a), flat(b)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))
