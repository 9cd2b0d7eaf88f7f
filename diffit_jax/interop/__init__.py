"""Weights as safetensors files, in our own layout and in others'."""

from diffit_jax.interop.official import load_official, save_official

__all__ = ["load_official", "save_official"]
