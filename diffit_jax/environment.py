"""What of JAX's options and variables may change a result, and what may not.

Every draw is a function of (seed, step, index) alone, of one type, by one
generator. The commands therefore set the options of `PINNED`, whatever the
environment says, and refuse the flags of `REFUSED_XLA_FLAGS`. All other options
of jax 0.10.2 were gone through; they are the user's:

  rounding only      jax_disable_jit, jax_disable_most_optimizations,
                     jax_optimization_level, jax_softmax_custom_jvp, ...; what
                     else stands in XLA_FLAGS and LIBTPU_INIT_ARGS
  the same bits      jax_threefry_gpu_kernel_lowering, jax_enable_custom_prng,
                     jax_high_dynamic_range_gumbel (we draw no Gumbel noise)
  place, not value   jax_platforms, jax_default_device, jax_num_cpu_devices
  to debug with      jax_debug_nans, jax_enable_checks, jax_transfer_guard, ...:
                     an error, or slower
"""

from collections.abc import MutableMapping
import os
import sys

from absl import logging

from diffit_jax.errors import UserError

PRNG = "threefry2x32"  # of every key: jax.random.key(seed, impl=PRNG)

_DRAWS = {
  "jax_enable_x64": False,  # draws of a default type, and all default types
  "jax_default_prng_impl": PRNG,
  "jax_threefry_partitionable": True,  # other bits from the same key
  "jax_random_seed_offset": 0,
}
PINNED = {
  **_DRAWS,
  "jax_explicit_x64_dtypes": "warn",  # float64 only where x64 is on
  "jax_numpy_dtype_promotion": "standard",
  "jax_numpy_rank_promotion": "allow",
  "jax_default_matmul_precision": None,  # `config.matmul_precision` decides
  "nvidia_tf32_override": None,  # likewise; read by NVIDIA's libraries
  "flax_fix_rng_separator": False,  # keys of parameters and dropout
  "flax_preserve_adopted_names": False,  # names of parameters
  "flax_return_frozendict": False,
}
REFUSED_XLA_FLAGS = {
  "xla_cpu_enable_fast_math": "hides values that are not finite",
  "xla_cpu_enable_fast_min_max": "hides values that are not finite",
  "xla_gpu_enable_fast_min_max": "hides values that are not finite",
  "xla_gpu_default_to_alg_dot_bf16_bf16_f32": "rounds products to bfloat16,"
  " which config.matmul_precision decides",
}
_SPELLINGS = dict.fromkeys(("y", "yes", "t", "true", "on"), "1")
_SPELLINGS |= dict.fromkeys(("n", "no", "f", "false", "off"), "0")


def pin(environ: MutableMapping[str, str] = os.environ) -> None:
  """Sets `PINNED`, whether jax is imported already or not.

  What the user had set otherwise is named in one line of the log.

  Raises:
    UserError: XLA_FLAGS holds one of `REFUSED_XLA_FLAGS`.
  """
  _check_xla_flags(environ.get("XLA_FLAGS", ""))
  changed = []
  for option, value in PINNED.items():
    variable = option.upper()
    given = environ.get(variable, value)
    if _spell(given) != _spell(value):
      changed.append(f"{variable}={given}")
    environ.pop(variable, None)
    if value is not None:
      environ[variable] = _spell(value)
    config = _config_of(option)
    if config is not None and _spell(getattr(config, option)) != _spell(value):
      if _spell(given) == _spell(value):
        changed.append(f"{option}={getattr(config, option)}")
      config.update(option, value)
  if changed:
    logging.warning(
      "%s: not followed, so that results depend on seed, step and index alone",
      ", ".join(changed),
    )


def check() -> None:
  """Refuses options under which a run would draw other numbers.

  For functions that are called without a command, which has pinned them.

  Raises:
    UserError: one of the options has another value, naming it.
  """
  import jax

  for option, value in _DRAWS.items():
    found = getattr(jax.config, option, value)
    if _spell(found) != _spell(value):
      raise UserError(
        f"{option}={found} would change the run's draws and types: call"
        f" jax.config.update({option!r}, {value!r}) before"
      )


def _check_xla_flags(text: str) -> None:
  for word in text.split():
    name, _, value = word.lstrip("-").partition("=")
    if name in REFUSED_XLA_FLAGS and _spell(value or "true") != "0":
      raise UserError(
        f"XLA_FLAGS holds {word}, which {REFUSED_XLA_FLAGS[name]}: take it out"
      )


def _config_of(option: str):
  """The loaded library's config that has the option, or None."""
  library = sys.modules.get(option.partition("_")[0])
  config = getattr(library, "config", None)
  return config if hasattr(config, option) else None


def _spell(value: object) -> str:
  """One spelling of each value, be it from a variable or a config."""
  text = str(getattr(value, "name", value)).lower()  # JAX has enums, too
  return _SPELLINGS.get(text, text)
