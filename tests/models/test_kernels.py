"""The probe of fused attention kernels: right ones pass, wrong ones do not."""

import jax
import jax.numpy as jnp
import pytest

from configs import (
  cifar10,
  cifar10_song,
  digits,
  ffhq64,
  imagenet256,
  imagenet512,
)
from diffit_jax import models
from diffit_jax.errors import UserError
from diffit_jax.models import kernels
from diffit_jax.models.baselines.dit import DiT
from diffit_jax.models.kernels import AttentionShape, by_heads
from diffit_jax.models.kernels import probe as probe_lib
from diffit_jax.models.kernels.plain import attend
from diffit_jax.training import checks
from diffit_jax.training import program as program_lib
from slow import slow

SHAPE = AttentionShape(tokens=16, heads=2, width=16, bias="shared")


def probe(kernel, bias="shared"):
  """Probes a function that a row of the table makes a kernel."""
  with pytest.MonkeyPatch.context() as patch:
    row = kernels.Kernel(by_heads(kernel))
    patch.setitem(kernels.KERNELS, "made_up", row)
    probe_lib.probe("made_up", SHAPE._replace(bias=bias))


def in_another_order(q, k, v, bias):
  """The same attention, computed two halves of the keys at a time."""
  logits = jnp.einsum(
    "...nd,...md->...nm", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * q.shape[-1] ** -0.5
  logits += 0 if bias is None else bias.astype(q.dtype)
  half = logits.shape[-1] // 2
  top = logits.max(-1, keepdims=True)
  weights = jnp.exp(logits - top)
  parts = [
    jnp.einsum("...nm,...md->...nd", w.astype(v.dtype), x)
    for w, x in (
      (weights[..., :half], v[..., :half, :]),
      (weights[..., half:], v[..., half:, :]),
    )
  ]
  total = weights.sum(-1)[..., None]
  return ((parts[0] + parts[1]) / total).astype(v.dtype)


@pytest.mark.parametrize("bias", [slow("shared"), "each", "none"])
def test_a_right_kernel_passes(bias):
  probe(in_another_order, bias)


def test_a_kernel_is_one_row_of_the_table(monkeypatch):
  """Networks without a bias take it, too, and its refusals are its own."""
  model = DiT(input_size=8, depth=1, num_classes=3, attention="made_up")
  arrays = jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
  message = r"'made_up': use one of \('xla', 'auto'\)"
  with pytest.raises(UserError, match=message):
    jax.eval_shape(model.init, *arrays)
  found = []

  def kernel(q, k, v, bias):
    heads, tokens, width = q.shape[-3:]
    found.append(AttentionShape(tokens, heads, width, str(bias)))
    return v

  refusal = lambda shape: "wants few tokens of {}" * (shape.tokens > 16)
  row = kernels.Kernel(by_heads(kernel), dtype="bfloat16", refusal=refusal)
  monkeypatch.setitem(kernels.KERNELS, "made_up", row)
  jax.eval_shape(model.init, *arrays)
  assert found[0] == model.attention_shapes(8)[0]._replace(bias="None")
  kernels.check_machine("made_up", "tpu", "TPU v4", "bfloat16")
  with pytest.raises(UserError, match="'made_up' computes in bfloat16: set"):
    kernels.check_machine("made_up", "tpu", "TPU v4", "float32")
  message = "'made_up' wants few tokens of DiT: use model.attention='xla'"
  with pytest.raises(UserError, match=message):
    jax.eval_shape(model.clone(patch_size=1).init, *arrays)


def without_bias(q, k, v, bias):
  return attend(q, k, v, jnp.zeros_like(bias))


def without_bias_gradient(q, k, v, bias):
  return attend(q, k, v, jax.lax.stop_gradient(bias))


@jax.custom_vjp
def bias_of_one_window(q, k, v, bias):
  """Its d(bias) forgets to sum over the batch."""
  return attend(q, k, v, bias)


def forward(*args):
  return attend(*args), args


def backward(args, g):
  _, vjp = jax.vjp(attend, *args)
  first = jax.vjp(attend, *(x[:1] for x in args[:3]), args[3])[1]
  return *vjp(g)[:3], first(g[:1])[3]


bias_of_one_window.defvjp(forward, backward)


def without_scale(q, k, v, bias):
  return attend(q * q.shape[-1] ** 0.5, k, v, bias)


def transposed(q, k, v, bias):
  return attend(q, k, v, bias.swapaxes(1, 2))


@pytest.mark.parametrize(
  "kernel, what",
  [
    (without_bias, "output"),
    slow(without_scale, "output"),
    (transposed, "output"),
    slow(without_bias_gradient, r"d\(bias\)"),
    (bias_of_one_window, r"d\(bias\)"),
  ],
)
def test_wrong_kernels_are_refused(kernel, what):
  with pytest.raises(UserError, match=f"wrong {what} here.*attention=xla"):
    probe(kernel)


@pytest.mark.parametrize(
  "config, shapes",
  [
    (imagenet512.get_config(), [(32**2, 16, 72, "shared")]),
    (ffhq64.get_config(), [(64, 2, 64, "shared"), (64, 4, 64, "shared")]),
  ],
  ids=["imagenet512", "ffhq64"],
)
def test_every_shape_of_the_model_is_probed(config, shapes, monkeypatch):
  found = []
  monkeypatch.setattr(probe_lib, "probe", lambda *args: found.append(args))
  model = models.make_model(config.model)
  all_shapes = model.attention_shapes(config.data.resolution)
  probe_lib.probe_all(kernels.PLAIN, all_shapes)
  assert not found  # plain XLA needs none
  probe_lib.probe_all("cudnn", all_shapes, 6)
  assert found == [("cudnn", shape, 6, "bfloat16") for shape in shapes]


def test_cudnn_is_refused_where_it_cannot_run():
  config = digits.get_config("debug,precision=bf16")
  config.model.attention = "cudnn"
  with pytest.raises(UserError, match="needs an NVIDIA GPU, not cpu"):
    program_lib.build(config)
  with pytest.raises(UserError, match="does not run here.*attention=xla"):
    probe_lib.probe("cudnn", SHAPE)
  with pytest.raises(UserError, match="model.dtype=bfloat16"):
    kernels.check_machine("cudnn", "gpu", "NVIDIA H100", "float32")


@pytest.mark.parametrize(
  "config",
  [
    imagenet256.get_config("debug,modulation=dit"),
    cifar10.get_config("debug,rung=C"),
    cifar10_song.get_config("debug,tmsa"),
  ],
  ids=["dit", "ladder", "song_unet"],
)
def test_cudnn_is_refused_where_a_model_does_not_have_it(config):
  with config.unlocked():
    config.model.update(attention="cudnn", dtype="bfloat16")
  message = (
    f"^{config.model.name} has no model.attention='cudnn': only image_diffit"
    " and latent_diffit have it; use model.attention=xla$"
  )
  for refuse in (
    lambda: checks.check_consistent(config),
    lambda: models.make_model(config.model),
  ):
    with pytest.raises(UserError, match=message):
      refuse()


def test_unknown_ways_to_compute_are_refused():
  for field in ("attention", "remat"):
    config = digits.get_config("debug")
    config.model[field] = "foo"
    with pytest.raises(UserError, match=f"model.{field}='foo': use one of"):
      program_lib.build(config)


@pytest.mark.parametrize(
  "config",
  [
    cifar10.get_config("debug"),
    cifar10.get_config("debug,rung=A"),
    cifar10.get_config("debug,rung=C"),
    cifar10.get_config("debug,rung=D"),
    cifar10_song.get_config("debug,tmsa"),
    digits.get_config("debug,time_in=rpb_time"),
    imagenet256.get_config("debug"),
    imagenet256.get_config("debug,modulation=dit"),
  ],
  ids=lambda config: config.name,
)
def test_a_network_tells_what_it_computes(config, monkeypatch):
  found = set()

  def kernel(q, k, v, bias):
    heads, tokens, width = q.shape[-3:]
    kinds = {0: "none", 3: "shared", 5: "each"}
    kind = kinds[0 if bias is None else bias.ndim]
    found.add(AttentionShape(tokens, heads, width, kind))
    return v

  row = kernels.Kernel(by_heads(kernel))
  monkeypatch.setitem(kernels.KERNELS, kernels.PLAIN, row)
  model, side = models.make_model(config.model), config.data.resolution
  x = jnp.zeros((1, side, side, model.channels))
  jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1))
  assert found == set(model.attention_shapes(side))


def test_auto_takes_what_the_device_serves():
  model = models.make_model(imagenet512.get_config().model)
  shapes = model.attention_shapes(64)
  choose = lambda *machine: kernels.choose(shapes, *machine)
  assert choose("tpu", "TPU v5 lite", "bfloat16") == "pallas"
  assert choose("tpu", "TPU v4", "bfloat16") == kernels.PLAIN
  assert choose("tpu", "TPU v5 lite", "float32") == kernels.PLAIN
  assert choose("gpu", "NVIDIA H100", "bfloat16") == "cudnn"
  assert choose("cpu", "cpu", "bfloat16") == kernels.PLAIN
  each = [shape._replace(bias="each") for shape in shapes]
  assert kernels.choose(each, "tpu", "TPU v6 lite", "bfloat16") == kernels.PLAIN
  message = "'pallas' needs a TPU newer than TPU v4, not TPU v4: use"
  with pytest.raises(UserError, match=message):
    kernels.check_machine("pallas", "tpu", "TPU v4", "bfloat16")
