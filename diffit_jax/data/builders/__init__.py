"""TFDS builders; `diffit_jax.prepare` runs them. None needs TensorFlow."""
