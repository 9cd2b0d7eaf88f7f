"""Training steps of a tiny latent model, against PyTorch in float64.

Network, loss (twelve steps of ADM's, with its stop-gradient; 25 of flow
matching, predicting v), AdamW and both averages, through the production step.
`latent_trajectory.json` and `flow_trajectory.json` say where their numbers come
from; the settings and inputs below are closed forms that any language can make
again: hash fills (`goldens.hfill`) in PyTorch's layout, [b, c, h, w].
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffit_jax.diffusion import adm, flow
from diffit_jax.interop import official
from diffit_jax.models import latent
from diffit_jax.models.latent import LatentDiffiT
from diffit_jax.parallel import mesh as mesh_lib
from diffit_jax.parallel import sharding
from diffit_jax.run import state as state_lib
from diffit_jax.training import step as step_lib
from diffit_jax.training.optimizer import make_optimizer
from goldens import hfill
from slow import slow

MODEL = LatentDiffiT(
  input_size=4, hidden_dim=16, depth=2, num_heads=2, num_classes=5
)
FILL = 0.2  # every parameter is hfill(official key, shape, FILL)
BATCH = 4
OPTIMIZER = dict(
  name="adamw",
  learning_rate=3e-3,
  rampup_images=0,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.01,
  clip_norm=0.0,
  sanitise_gradients=True,
)
EMA = {  # both start as the weights; the second ramps up during the run
  "constant": dict(kind="constant", decay=0.99),
  "halflife": dict(kind="halflife", halflife_images=10, rampup_ratio=0.5),
}
SCHEDULE = adm.make_schedule()
FLOW = flow.Flow(prediction="v", loss="v", time_scale=1000.0)


def reference(name: str) -> dict:
  path = pathlib.Path(__file__).with_name(f"{name}_trajectory.json")
  return json.loads(path.read_text())


def adm_losses(network, batch) -> dict[str, jax.Array]:
  x_t = SCHEDULE.q_sample(batch["x0"], batch["t"], batch["noise"])
  out = network(x_t, batch["t"])
  return SCHEDULE.losses(out, batch["x0"], batch["t"], batch["noise"])


def flow_losses(network, batch) -> dict[str, jax.Array]:
  t = (batch["t_1024"] + 0.5) / 1024
  loss = FLOW.train_losses(network, batch["x0"], t, batch["noise"])
  return {"loss": loss}


def make_batch(s: int) -> dict[str, np.ndarray]:
  """Step s. Times reach both ends; labels are 0-3 and the null class 5.

  Some x_0 lie beyond +-0.999, where the bins of the t = 0 term are open. Row 4
  of the label table never gets a gradient, so weight decay alone moves it.
  """
  fill = lambda name, amplitude: np.moveaxis(
    hfill(f"{name}{s}", (BATCH, 4, 4, 4), amplitude), 1, -1
  ).astype(np.float32)
  last, t = s % 2, [83 * s + 1, 611 * s + 20, 389 * s + 5]
  return {
    "x0": fill("x0", 1.5),
    "noise": fill("noise", 3**0.5),  # of variance 1
    "t": np.int32([999 * last, *t]) % 1000,
    "t_1024": np.int32([1023 * last, *t]) % 1024,
    "label": np.int32([(0, 1, 2, 3, 5)[(s + i) % 5] for i in range(BATCH)]),
  }


def is_trained(key: str) -> bool:
  return key != "pos_embed" and not key.endswith("relative_position_index")


def filled(model, folder):
  """The filled parameters, through a file in the released layout."""
  path, batch = folder / "start.safetensors", make_batch(0)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), batch["x0"], batch["t"]
  )["params"]
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  official.save_official(path, model, zeros)
  tensors = safetensors.numpy.load_file(path)
  for key in filter(is_trained, tensors):
    tensors[key] = np.float32(hfill(key, tensors[key].shape, FILL))
  safetensors.numpy.save_file(tensors, path)
  found, params = official.load_official(path)
  assert found == model
  return params


def train(model, params, all_losses, steps):
  """The production step, jitted: the losses of each step, final state."""

  def losses(params, batch):
    network = lambda x, t: model.apply({"params": params}, x, t, batch["label"])
    return all_losses(network, batch)

  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  optimizer = make_optimizer(OPTIMIZER, BATCH)
  init = state_lib.make_init(lambda: params, optimizer, EMA)
  step = step_lib.make_step(
    lambda params, batch, key: losses(params, batch)["loss"],
    optimizer,
    EMA,
    batch_size=BATCH,
    seed=0,
  )
  step = step_lib.compile_step(step, mesh, state_lib.abstract_state(init, mesh))
  parts = jax.jit(lambda *args: jax.tree.map(jnp.mean, losses(*args)))
  state, history = state_lib.create(init, mesh), []
  for s in range(steps):
    batch = make_batch(s)
    of_step = parts(state.params, batch)
    state, monitor = step(
      state, state_lib.new_monitor(mesh), sharding.put_batch(mesh, batch)
    )
    del of_step["loss"]  # in the step's own rounding
    history.append([monitor.loss, *of_step.values()])
  return np.array(jax.device_get(history)), state


def official_tensors(path, model, params):
  """Trained tensors in the released layout, less rows without gradient.

  What time and bias add to the keys cancels in the softmax: the gradient is
  rounding noise there, which Adam turns into steps of any size.
  """
  official.save_official(path, model, jax.device_get(params))
  tensors = safetensors.numpy.load_file(path)
  tensors = {key: tensors[key] for key in filter(is_trained, tensors)}
  for key, tensor in tensors.items():
    if key.endswith("qkv.bias") or "qkv_temb" in key:
      q, _, v = np.split(tensor, 3)
      tensors[key] = np.concatenate([q, v])
  return {key: np.float64(tensor).ravel() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
  "objective, scan_blocks",
  [("adm", True), slow("adm", False), slow("flow", True)],
)
def test_training_follows_pytorch_in_float64(objective, scan_blocks, tmp_path):
  """Measured: losses 5e-7; tensors 9e-7 where worst, 2.5e-7 at their ends.

  Adam divides a gradient by its size, so that the rounding of a small gradient
  moves a parameter by more than float32's own 1e-8. In sums the errors mostly
  cancel, to 6e-8 per element. The bounds leave a factor of 5 to 20 for other
  machines. Training moves the weights by 3e-2; the finest mistakes tried, no
  weight decay and an exact GELU, move sums by 4e-5 and 2e-6 per element.
  """
  is_flow = objective == "flow"
  wanted = reference("flow" if is_flow else "latent")
  model = MODEL.clone(learn_sigma=not is_flow)
  params = filled(model, tmp_path)
  model = model.clone(scan_blocks=scan_blocks)
  if not scan_blocks:
    params = latent.unstack_blocks(params)
  losses = flow_losses if is_flow else adm_losses
  history, state = train(model, params, losses, len(wanted["losses"]))
  expected = np.reshape(wanted["losses"], history.shape)
  np.testing.assert_allclose(history, expected, rtol=1e-5)

  averages = {f"ema_{name}": tree for name, tree in state.ema.items()}
  for name, tree in {"params": state.params, **averages}.items():
    tensors = official_tensors(tmp_path / "end.safetensors", model, tree)
    assert tensors.keys() == wanted[name].keys()
    for key, w in tensors.items():
      sums = [w.sum(), np.abs(w).sum(), w @ hfill("probe", w.shape, 1)]
      expected, message = wanted[name][key], f"{name} {key}"
      np.testing.assert_allclose(
        sums, expected[:3], rtol=0, atol=3e-7 * w.size, err_msg=message
      )
      np.testing.assert_allclose(
        w[[0, -1]], expected[3:], rtol=0, atol=2e-6, err_msg=message
      )
