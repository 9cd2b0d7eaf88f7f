"""One flat config file per setting of the paper; none imports diffit_jax."""
