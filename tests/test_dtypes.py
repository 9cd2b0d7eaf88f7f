"""Solvers and formulas follow the type of their inputs, x64 on or off.

Values in float64 are compared beside each solver's and formula's other tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.diffusion import adm, augment, edm, guidance
from diffit_jax.diffusion.guidance import Guidance
import vp_problems as vp

B, SHAPE = 3, (3, 4, 4, 2)
SOLVERS = {
  "edm_heun": dict(S_churn=9.0),
  "ddpm": dict(clip_denoised=True),
  "ddim": dict(eta=0.5),
  "dpmpp_2m": {},
  "unipc": dict(order=3),
  "euler_maruyama": dict(diffusion="sin2"),
}
SERVED = [(solver, p) for solver, own in sampling.SOLVERS.items() for p in own]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver, process", SERVED)
def test_solvers(x64, solver, process, dtype):
  seen = []

  def denoiser(x, level):
    seen.append((str(x.dtype), str(level.dtype)))
    return vp.curved(x, level.astype(x.dtype)) if process == "adm" else x

  options = sampling.process_options(solver, process) | SOLVERS.get(solver, {})
  run = functools.partial(sampling.sample, denoiser, solver, steps=3, **options)
  noise = jax.ShapeDtypeStruct(SHAPE, dtype)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
  out = jax.eval_shape(lambda z, k: run(z, keys=k), noise, keys)
  # Steps are whole numbers of the default type, so that t / 1000 is float64.
  level = "int64" if process == "adm" else dtype
  assert out.dtype == dtype and set(seen) == {(dtype, level)}


S = adm.make_schedule(1000)
CFG = dict(scale=1.7, schedule="power_cosine", interval=(10.0, 800.0))
DRAWN = ("xflip", "yflip", *augment.GEOMETRIC, "aniso_angle")
per_process = lambda f: [
  f(edm.make({"precond": k, "sigma_data": 0.5, "P_mean": 0, "P_std": 1}))
  for k in edm.PRECONDS
]
FORMULAS = {  # of images x, levels s [b] and steps t [b] int32
  "edm.coefficients": lambda x, s, t: per_process(lambda p: p.coefficients(s)),
  "edm.denoise": lambda x, s, t: per_process(
    lambda p: p.denoise(lambda x, _: x.astype(jnp.bfloat16), x, s)
  ),
  "edm.loss": lambda x, s, t: per_process(lambda p: p.loss(x, x, s)),
  "edm.vp": lambda x, s, t: (edm.vp_sigma(s), edm.vp_time(s)),
  "adm.q_sample": lambda x, s, t: S.q_sample(x, t, x),
  "adm.losses": lambda x, s, t: S.losses(
    jnp.concatenate([x, x], axis=-1), x, t, x
  ),
  "guidance.scale": lambda x, s, t: Guidance(**CFG).scale_at(s),
  "guidance.cfg": lambda x, s, t: [
    guidance.apply_cfg(x, x, level, **CFG) for level in (s, t)
  ],
  "guidance.constant": lambda x, s, t: guidance.apply_cfg(x, x, None, scale=2),
  "augment": lambda x, s, t: augment.augment(x, {k: s for k in DRAWN}),
  "augment.labels": lambda x, s, t: augment.labels({k: s for k in DRAWN}),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas(x64, formula, dtype):
  out = jax.eval_shape(
    FORMULAS[formula],
    jax.ShapeDtypeStruct(SHAPE, dtype),
    jax.ShapeDtypeStruct((B,), dtype),
    jax.ShapeDtypeStruct((B,), jnp.int32),
  )
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {dtype}


def test_guidance_in_float64_keeps_its_digits(x64):
  """scale and steps were rounded to float32: off by 2e-8."""
  rng = np.random.default_rng(4)
  c, u = rng.normal(size=(2, B, 4, 4, 2))
  t = np.array([7, 333, 998])
  bump = (1 - np.cos(np.pi * (1 - t / 1000) ** 2.5)) / 2
  s = (1 + 0.7 * bump)[:, None, None, None]
  cfg = dict(scale=1.7, schedule="power_cosine", power=2.5)
  for level in (jnp.int32(t), jnp.float64(t)):
    found = guidance.apply_cfg(jnp.asarray(c), jnp.asarray(u), level, **cfg)
    np.testing.assert_allclose(found, u + s * (c - u), rtol=1e-12, atol=1e-14)
  found = guidance.apply_cfg(jnp.asarray(c), jnp.asarray(u), None, scale=1.7)
  np.testing.assert_allclose(found, u + 1.7 * (c - u), rtol=1e-12, atol=1e-14)
