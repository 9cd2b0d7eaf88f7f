"""UniPC: the paper's algorithm in numpy, measured orders, DPM-Solver++(2M)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffit_jax import sampling
from diffit_jax.diffusion import adm
from diffit_jax.errors import UserError
from diffit_jax.sampling import unipc
from slow import slow
import vp_problems as vp


def zhao(network, z, kept, order, variant):
  """Zhao et al. 2023, Algorithms 5 and 6, B(h) and phi as in the paper.

  phi_1(h) = (1 - e^-h) / h and phi_{k+1}(h) = (1/k! - phi_k(h)) / h, for which
  int_0^1 e^{(u-1) h} u^k/k! du = phi_{k+1}(h).
  """
  abar = vp.ABAR[kept]
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  lam = np.log(alpha / sigma)
  n = len(kept)

  def predict(x, i):
    eps = network(x, kept[i])[..., : x.shape[-1]]
    return (x - sigma[i] * eps) / alpha[i]

  def combine(x, i, D, levels):
    """From level i - 1 to i, with predictions at further levels."""
    h = lam[i] - lam[i - 1]
    B = h if variant == "bh1" else 1 - np.exp(-h)
    phi = [(1 - np.exp(-h)) / h]
    for k in range(1, 5):
      phi.append((1 / math.factorial(k) - phi[-1]) / h)
    r = [(lam[j] - lam[i - 1]) / h for j in levels]
    q = len(levels)
    R = [[r_m**k for r_m in r] for k in range(q)]
    b = [h * math.factorial(k) * phi[k] / B for k in range(1, q + 1)]
    a = [0.5] if q == 1 else np.linalg.solve(R, b) if q else []
    x = sigma[i] / sigma[i - 1] * x + alpha[i] * (1 - np.exp(-h)) * D[i - 1]
    return x + alpha[i] * B * sum(
      a_m * (D[j] - D[i - 1]) / r_m for a_m, j, r_m in zip(a, levels, r)
    )

  x = z
  D = {0: predict(x, 0)}
  for i in range(1, n):
    p = min(order, i, n + 1 - i)
    levels = [i - m for m in range(2, p + 1)]
    predicted = combine(x, i, D, levels)
    D[i] = predict(predicted, i)
    x = combine(x, i, D, [*levels, i])
  return D[n - 1]


@pytest.mark.parametrize("n", [1, slow(2), 4, slow(15)])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_algorithm(x64, order, variant, n):
  z = vp.noise_of()
  x = jax.jit(
    lambda z: sampling.sample(
      vp.curved, "unipc", z, steps=n, order=order, variant=variant
    )
  )(z)
  kept = adm.make_schedule(1000, f"logsnr{n}").timesteps[::-1]
  expected = zhao(lambda x, t: vp.curved(x, t, np), z, kept, order, variant)
  np.testing.assert_allclose(x, expected, rtol=1e-8)


@pytest.mark.parametrize("spacing", ["logsnr", "uniform"])
def test_without_corrector_orders_one_and_two_are_known_solvers(x64, spacing):
  run = lambda solver, **options: sampling.sample(
    vp.curved, solver, vp.noise_of(), steps=12, spacing=spacing, **options
  )
  np.testing.assert_allclose(
    run("unipc", order=1, corrector=False), run("ddim"), rtol=1e-9
  )
  np.testing.assert_allclose(
    run("unipc", order=2, corrector=False), run("dpmpp_2m"), rtol=1e-9
  )


@pytest.mark.parametrize(
  "order, corrector",
  [
    slow(1, False),
    (1, True),
    (2, False),
    slow(2, True),
    slow(3, False),
    (3, True),
  ],
)
def test_order(x64, order, corrector):
  """The corrector raises the predictor's order by one; see test_ddim."""
  z = vp.noise_of()
  run = lambda n: sampling.sample(
      vp.denoiser_of(vp.TWO_NORMALS), "unipc", z, steps=n, order=order,
      corrector=corrector, spacing="logsnr_exact",
  )  # fmt: skip
  end = vp.trajectory_end()
  orders = vp.measured_orders(run, end, (81, 161, 321))
  # Coarser steps are not yet where the order rules at order 3.
  np.testing.assert_allclose(orders, order + corrector, atol=0.2)
  np.testing.assert_allclose(orders[-1], order + corrector, atol=0.15)


def test_bh1_is_of_the_same_order(x64):
  z = vp.noise_of()
  run = lambda n: sampling.sample(
      vp.denoiser_of(vp.TWO_NORMALS), "unipc", z, steps=n, variant="bh1",
      spacing="logsnr_exact",
  )  # fmt: skip
  end = vp.trajectory_end()
  orders = vp.measured_orders(run, end, (81, 161, 321))
  np.testing.assert_allclose(orders, 3, atol=0.15)


def test_float32_follows_float64():
  z = vp.noise_of()
  run = lambda: sampling.sample(
    vp.denoiser_of(vp.TWO_NORMALS), "unipc", z, steps=50, order=3
  )
  x = run()
  with jax.enable_x64(True):
    expected = run()
  assert x.dtype == jnp.float32 and expected.dtype == jnp.float64
  np.testing.assert_allclose(x, expected, atol=1e-5)


def test_one_evaluation_per_step_traced_once():
  run = lambda denoiser: sampling.sample(
    denoiser, "unipc", jnp.zeros(vp.SHAPE), steps=20, order=3
  )
  assert vp.traced_calls(run) == [(vp.SHAPE, jnp.float32, (3,), jnp.int32)]
  assert sampling.make_solver("unipc", 20, order=3).num_evaluations == 20


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(order=4), "order=4 must be 1, 2 or 3"),
    (dict(variant="bh3"), "variant='bh3' is unknown; allowed: bh1, bh2"),
    (dict(steps=0), "steps=0 must be from 1 to 1000"),
  ],
)
def test_mistakes(kwargs, message):
  with pytest.raises(UserError, match=message):
    unipc.make_solver(**{"steps": 5, **kwargs})
