"""The yardstick: the same networks in plain PyTorch, as a user has them.

For the benchmarks alone, in a Python of its own; neither the project nor its
tests need it.

  python3 -m venv .venv-torch
  .venv-torch/bin/pip install -r benchmarks/torch_reference/requirements.txt
"""
