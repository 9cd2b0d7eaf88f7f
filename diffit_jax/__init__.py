"""DiffiT (Diffusion Vision Transformers, arXiv 2312.02139) in JAX."""

import os
import sys

from diffit_jax import interrupt

__version__ = "0.1.0"

# Read by epath at its first use: gs:// through gcsfs, not through TensorFlow.
os.environ.setdefault("EPATH_USE_TF", "0")
if sys.argv[0] == "-m":  # python -m diffit_jax.main: its imports come next
  interrupt.handle()
