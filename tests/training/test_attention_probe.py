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
from diffit_jax.models.attention import attend
from diffit_jax.training import attention_probe, checks
from diffit_jax.training import program as program_lib


def in_another_order(q, k, v, bias):
  """The same attention, computed two halves of the keys at a time."""
  logits = jnp.einsum(
    "bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * q.shape[-1] ** -0.5 + bias.astype(q.dtype)
  half = logits.shape[-1] // 2
  top = logits.max(-1, keepdims=True)
  weights = jnp.exp(logits - top)
  parts = [
    jnp.einsum("bhnm,bhmd->bhnd", w.astype(v.dtype), x)
    for w, x in (
      (weights[..., :half], v[:, :, :half]),
      (weights[..., half:], v[:, :, half:]),
    )
  ]
  total = weights.sum(-1)[..., None]
  return ((parts[0] + parts[1]) / total).astype(v.dtype)


def test_a_right_kernel_passes():
  attention_probe.probe(2, 16, 4, in_another_order)


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
    (without_scale, "output"),
    (transposed, "output"),
    (without_bias_gradient, r"d\(bias\)"),
    (bias_of_one_window, r"d\(bias\)"),
  ],
)
def test_wrong_kernels_are_refused(kernel, what):
  with pytest.raises(UserError, match=f"wrong {what} here.*attention=xla"):
    attention_probe.probe(2, 16, 4, kernel)


@pytest.mark.parametrize(
  "config, sizes",
  [
    (imagenet512.get_config(), [(16, 72, 32)]),
    (ffhq64.get_config(), [(2, 64, 8), (4, 64, 8), (4, 64, 8), (4, 64, 8)]),
  ],
  ids=["imagenet512", "ffhq64"],
)
def test_every_size_of_the_model_is_probed(config, sizes, monkeypatch):
  found = []
  monkeypatch.setattr(
    attention_probe, "probe", lambda *args: found.append(args)
  )
  attention_probe.probe_config(config)
  assert not found  # plain XLA needs none
  config.model.attention = "cudnn"
  attention_probe.probe_config(config)
  assert found == sizes


def test_cudnn_is_refused_where_it_cannot_run():
  config = digits.get_config("debug,precision=bf16")
  config.model.attention = "cudnn"
  with pytest.raises(UserError, match="needs an NVIDIA GPU, not a cpu"):
    program_lib.build(config)
  with pytest.raises(UserError, match="does not run here.*attention=xla"):
    attention_probe.probe(2, 16, 4)
  config.model.dtype = "float32"
  with pytest.raises(UserError, match="model.dtype=bfloat16"):
    attention_probe.check_config(config, "gpu")


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
    lambda: attention_probe.check_config(config, "gpu"),
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
