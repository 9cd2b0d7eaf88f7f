"""Feature spaces in which sets of images are compared.

  inception   the network behind FID; its weights are a file
  digits      64 hidden units of a small classifier, fitted on scikit-learn's
              digits each time it is used: for 8x8 images of digits
  pixels      8x8 averages of the pixels: for any images, but a weak measure

Only numbers of the first are called FID, sFID, IS or KID; those of the other
two have the name of their space (`frechet_digits`) and compare only with each
other.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.evaluation.features import SPACES
from diffit_jax.evaluation.features.extractor import Extractor, load_inception

_SIDE = 8  # of the averages, and of scikit-learn's digits
_HIDDEN = 64


def open_space(
  name: str, inception: str | None = None, resize: str = "tf1"
) -> Extractor:
  """The extractor of a feature space.

  Args:
    name: one of SPACES.
    inception: safetensors file of the network's weights, for "inception".
    resize: the network's rule for resizing, see `resize`.

  Raises:
    UserError: an unknown name, or no usable weights.
  """
  if name == "digits":
    return digits_space()
  if name == "pixels":
    return pixels_space()
  if name != "inception":
    raise UserError(f"--features={name}: use one of {', '.join(SPACES)}")
  if inception is None:
    raise UserError(
      "--inception is missing: FID and its kin need the weights of the"
      " Inception network, which are not shipped; fetch pytorch-fid's"
      " pt_inception-2015-12-05-6726825d.pth from its releases, convert it once"
      " (docs/evaluation.md has the line), and give --inception=FILE"
      ".safetensors; without it, --features=pixels compares averages of pixels,"
      " and --features=digits handwritten digits"
    )
  return load_inception(inception, resize)


def digits_space() -> Extractor:
  """Hidden units of a classifier of scikit-learn's digits.

  One hidden layer of 64, fitted on all 1,797 digits by L-BFGS from a fixed seed
  on one thread; the hash tells if two machines got different weights.
  """
  from sklearn import datasets, neural_network
  import threadpoolctl

  real = datasets.load_digits()
  classifier = neural_network.MLPClassifier(
    (_HIDDEN,), solver="lbfgs", alpha=0.1, max_iter=1000, random_state=0
  )
  with threadpoolctl.threadpool_limits(1):  # another order, other sums
    classifier.fit(np.round(real.data * (255 / 16)) / 255, real.target)
  kernel, bias = classifier.coefs_[0], classifier.intercepts_[0]
  params = {
    "kernel": kernel.astype(np.float32),
    "bias": bias.astype(np.float32),
  }

  def apply(params, images):
    if images.shape[1:3] != (_SIDE, _SIDE):
      raise UserError(
        "--features=digits is for 8x8 images of digits, and these are"
        f" {images.shape[1]}x{images.shape[2]}"
      )
    x = images.astype(jnp.float32).mean(-1).reshape(-1, _SIDE**2) / 255
    x = jnp.dot(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return {"pool": jax.nn.relu(x + params["bias"])}

  digest = hashlib.sha256(params["kernel"].tobytes() + params["bias"].tobytes())
  entry = {"name": "digits", "sha256": digest.hexdigest()}
  return Extractor("digits", entry, params, apply)


def pixels_space() -> Extractor:
  """Averages of the pixels over an 8x8 grid, for each colour: 192 numbers."""

  def apply(params, images):
    del params
    x = images.astype(jnp.float32)
    rows, columns = (_averaging(n) for n in images.shape[1:3])
    x = jnp.einsum(
      "rh,bhwc,sw->brsc", rows, x, columns, precision=jax.lax.Precision.HIGHEST
    )
    return {"pool": x.reshape(len(images), -1) / 255}

  return Extractor("pixels", {"name": "pixels"}, {}, apply)


def _averaging(size: int) -> np.ndarray:
  """[8, size]: row i averages the i-th eighth; a pixel may count in parts."""
  edges = np.linspace(0, size, _SIDE + 1)
  low, high = edges[:-1, None], edges[1:, None]
  pixel = np.arange(size)
  overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
  return (overlap.clip(0) * (_SIDE / size)).astype(np.float32)
