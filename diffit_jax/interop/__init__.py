"""Weights as safetensors files, in our own layout and in others'."""
