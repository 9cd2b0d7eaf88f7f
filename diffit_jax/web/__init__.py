"""The page of `python -m diffit_jax.explore`; nothing else imports it."""
