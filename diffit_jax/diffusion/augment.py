"""Non-leaky augmentation of training images, with labels for the network.

Karras et al. 2022 (arXiv 2206.00364), appendix F.2, as EDM trains CIFAR-10 and
FFHQ; the network is told what was done to an image by 9 labels, and at sampling
zeros ask for images as they are. In this order, each behind a gate:

  transform    gate  parameter                       labels
  x flip       1*    w in {0, 1}                     w
  y flip       p     w in {0, 1}                     w
  scale        p     w ~ N(0,1), s = 2^(0.2 w)       w
  rotate       p     a ~ U(-pi, pi)                  cos a - 1, sin a
  anisotropy   p     w ~ N(0,1), s_a = 2^(0.2 w),    w cos r, w sin r
                     r ~ U(-pi, pi) half of the time, else 0
  translate    p     v_x, v_y ~ N(0,1), shift by     v_x, v_y
                     v/8 of the image's side

(* at p = 0 it is 0.) Flips are exact. The others are one inverse affine map in
pixels about the centre, x right and y down, from where a pixel goes to where it
comes from:

  A = R(a) R(-r) diag(1/s_a, s_a) R(r) / s,   source = A (target - shift)   (1)

with R(a) = [[cos a, -sin a], [sin a, cos a]], read from the image so that
nothing aliases: (2) reflect by side - 1 pixels at every edge, zeros beyond;
(3) upsample by 2 with the sym6 wavelet's low-pass; (4) read by bilinear
interpolation at the points of (1) of a grid of twice the side, and a margin of
6 pixels; (5) low-pass and downsample by 2, dropping the margin.

(2)+(3) and (5) are linear and the same for every image: one small dense matrix
per axis, made on the host, which suits a TPU and costs a CPU about 1 ms per
image of 64 x 64. CHOICE: EDM reflects only as far as the batch at hand needs,
which would tie an image to its batch; the images differ where a strong zoom out
brings the outer edge into view. CHOICE: an image with none of the last four
transforms is returned as it is, bit for bit; the filters would give it back to
8e-7.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.diffusion.arrays import at_least_float32, per_sample
from diffit_jax.errors import UserError

NUM_LABELS = 9
GEOMETRIC = ("scale", "rotate", "aniso_weight", "translate_x", "translate_y")

SYM6 = np.array(
  [  # decomposition low-pass, sum sqrt(2)
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
  ]
)
MARGIN = 6  # pixels that (4) reads in total beyond an image's side

Params = dict[str, jax.Array]


def draw_one(key: jax.Array, p: float) -> Params:
  """Parameters of one image from its key; scalars, see `draw_keys`."""
  gate_key, coin_key, angle_key, normal_key = jax.random.split(key, 4)
  gate_probs = jnp.array([min(1e8 * p, 1.0)] + 5 * [p], jnp.float32)
  as_float = lambda flags: flags.astype(jnp.float32)
  xflip, yflip, scale, rotate, aniso, translate = as_float(
    jax.random.bernoulli(gate_key, gate_probs)
  )
  coins = as_float(jax.random.bernoulli(coin_key, jnp.float32(0.5), (3,)))
  angles = jax.random.uniform(
    angle_key, (2,), jnp.float32, minval=-jnp.pi, maxval=jnp.pi
  )
  normals = jax.random.normal(normal_key, (4,), jnp.float32)
  return dict(
    xflip=xflip * coins[0],
    yflip=yflip * coins[1],
    scale=scale * normals[0],
    rotate=rotate * angles[0],
    aniso_weight=aniso * normals[1],
    aniso_angle=aniso * coins[2] * angles[1],
    translate_x=translate * normals[2],
    translate_y=translate * normals[3],
  )


def draw_keys(keys: jax.Array, p: float) -> Params:
  """Parameters of n images, each from its own key.

  Args:
    keys: [n] typed PRNG keys.
    p: gate probability, 0..1 (EDM: 0.12 for CIFAR-10, 0.15 for FFHQ-64).

  Returns:
    xflip, yflip (0 or 1), scale, rotate (radians), aniso_weight, aniso_angle
    (radians), translate_x, translate_y: [n] float32 each, the table's w, w, w,
    a, w, r, v_x, v_y; all 0 where the gate stayed shut.
  """
  if not 0 <= p <= 1:
    raise UserError(f"augmentation probability {p=} must be from 0 to 1")
  return jax.vmap(lambda key: draw_one(key, p))(keys)


def draw(key: jax.Array, n: int, p: float) -> Params:
  """`draw_keys` with the n keys split from one."""
  return draw_keys(jax.random.split(key, n), p)


def labels(params: Params) -> jax.Array:
  """[n, 9] labels, in the order of the table; float32, or as the params."""
  a, w, r = params["rotate"], params["aniso_weight"], params["aniso_angle"]
  columns = [
    params["xflip"],
    params["yflip"],
    params["scale"],
    jnp.cos(a) - 1,
    jnp.sin(a),
    w * jnp.cos(r),
    w * jnp.sin(r),
    params["translate_x"],
    params["translate_y"],
  ]
  return jnp.stack([at_least_float32(c) for c in columns], axis=-1)


@jax.jit
def augment(images: jax.Array, params: Params) -> jax.Array:
  """Transforms images by the given parameters.

  Args:
    images: [n, h, w, c] in [-1, 1], before noise is added; any h and w.
    params: as from `draw`, [n] each.

  Returns:
    [n, h, w, c] float32, or float64 as the images. Values may pass [-1, 1] a
    little: the filters ring.
  """
  x = at_least_float32(images)
  params = {k: jnp.asarray(v, x.dtype) for k, v in params.items()}
  x = jnp.where(per_sample(params["xflip"] > 0.5), x[:, :, ::-1], x)
  x = jnp.where(per_sample(params["yflip"] > 0.5), x[:, ::-1], x)
  _, h, w, _ = x.shape
  active = functools.reduce(
    jnp.logical_or, [params[name] != 0 for name in GEOMETRIC]
  )
  return jnp.where(
    per_sample(active), _resample(x, _inverse_affine(params, h, w)), x
  )


def _inverse_affine(params: Params, h: int, w: int) -> jax.Array:
  """(1) as [n, 2, 3] = [A | -A shift], target -> source, in pixels."""
  s, s_a = (2 ** (0.2 * params[k]) for k in ("scale", "aniso_weight"))
  r = params["aniso_angle"]
  zero = jnp.zeros_like(s_a)
  stretch = _matrices([[1 / s_a, zero], [zero, s_a]])
  shift_x = params["translate_x"] * 0.125 * w
  shift_y = params["translate_y"] * 0.125 * h
  A = _rotation(params["rotate"]) / s[:, None, None]
  for matrix in (_rotation(-r), stretch, _rotation(r)):
    A = _matmul("nij,njk->nik", A, matrix)
  shift = jnp.stack([shift_x, shift_y], axis=-1)[:, :, None]
  return jnp.concatenate([A, -_matmul("nij,njk->nik", A, shift)], axis=-1)


def _rotation(angle: jax.Array) -> jax.Array:
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return _matrices([[cos, -sin], [sin, cos]])


def _matrices(rows: list[list[jax.Array]]) -> jax.Array:
  """Rows of [n] entries -> [n, 2, 2]."""
  return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _resample(x: jax.Array, inverse_affine: jax.Array) -> jax.Array:
  """Steps (2) to (5): [n, h, w, c] and [n, 2, 3] -> [n, h, w, c]."""
  n, h, w, c = x.shape
  x = _matmul("ih,nhwc->niwc", _upsample_matrix(h), x)
  x = _matmul("jw,niwc->nijc", _upsample_matrix(w), x)
  x = _bilinear(x, _source_points(inverse_affine, h, w))
  x = _matmul("ih,nhwc->niwc", _downsample_matrix(h), x)
  return _matmul("jw,niwc->nijc", _downsample_matrix(w), x)


def _source_points(inverse_affine: jax.Array, h: int, w: int) -> jax.Array:
  """Where (4) reads, as [n, (x, y), rows, columns] indices into (3).

  One matrix product on purpose. Written as multiply-adds, XLA may evaluate the
  indices and the weights of `_bilinear` apart, with a fused multiply-add in one
  and not in the other; near a whole number they then round down to different
  pixels, and the weights belong to the wrong ones (seen on CPU).
  """
  axis = lambda side: (np.arange(2 * (side + MARGIN)) + 1 - side - MARGIN) / 2
  xs, ys = np.meshgrid(axis(w), axis(h))
  target = np.stack([xs, ys, np.ones_like(xs)])  # [3, rows, columns]
  centre = np.array([[0, 0, 3 * w - 2], [0, 0, 3 * h - 2]])
  centre = jnp.asarray(centre, inverse_affine.dtype)
  return _matmul("nij,jyx->niyx", 2 * inverse_affine + centre, target)


def _bilinear(x: jax.Array, points: jax.Array) -> jax.Array:
  """Reads [n, H, W, c] at [n, (x, y), *p]; the outermost elements are 0."""
  n, H, W, c = x.shape
  column = jnp.clip(points[:, 0], 0, W - 1)
  row = jnp.clip(points[:, 1], 0, H - 1)
  left = jnp.minimum(jnp.floor(column), W - 2)
  top = jnp.minimum(jnp.floor(row), H - 2)
  fx, fy = (column - left)[..., None], (row - top)[..., None]
  index = top.astype(jnp.int32) * W + left.astype(jnp.int32)
  pixels = x.reshape(n, H * W, c)
  read = jax.vmap(lambda image, i: image.at[i].get(mode="clip"))
  upper = (1 - fx) * read(pixels, index) + fx * read(pixels, index + 1)
  index = index + W
  lower = (1 - fx) * read(pixels, index) + fx * read(pixels, index + 1)
  return (1 - fy) * upper + fy * lower


@functools.cache
def _upsample_matrix(side: int) -> np.ndarray:
  """(2) and (3) along one axis, and a zero at either end for "zeros beyond".

  Zeros between the 3 side - 2 reflected pixels, 6 more at the ends, correlated
  with the reversed low-pass. [2 (3 side - 2) + 2, side] float64.
  """
  pad = ((side - 1, side - 1), (0, 0))
  reflected = np.pad(np.eye(side), pad, mode="reflect")
  sparse = np.zeros((2 * len(reflected) - 1 + 12, side))
  sparse[6:-6:2] = reflected
  up = [SYM6[::-1] @ sparse[i : i + 12] for i in range(2 * len(reflected))]
  return np.pad(np.stack(up), ((1, 1), (0, 0)))


@functools.cache
def _downsample_matrix(side: int) -> np.ndarray:
  """(5) along one axis: [side, 2 (side + MARGIN)] float64.

  5 zeros at the ends, correlated with the low-pass at every second position,
  and half of the margin cut from each end.
  """
  padded = np.pad(np.eye(2 * (side + MARGIN)), ((5, 5), (0, 0)))
  start = MARGIN // 2
  return np.stack(
    [SYM6 @ padded[2 * i : 2 * i + 12] for i in range(start, start + side)]
  )


def _matmul(equation: str, *operands) -> jax.Array:
  """Einsum in true float32; a TPU's default would round to bfloat16.

  Tables of the host take the type of the arrays.
  """
  dtype = jnp.result_type(*(o for o in operands if isinstance(o, jax.Array)))
  operands = [jnp.asarray(o, dtype) for o in operands]
  return jnp.einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)
