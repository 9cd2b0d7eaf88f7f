"""What libtpu needs before it compiles inside of a test."""

import jax
import pytest

from diffit_jax.planning import topology


@pytest.fixture(scope="module")
def libtpu_environment():
  """As the command sets it; no program of a plan can be loaded from a cache."""
  old = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  jax.devices()  # XLA has read its flags, of which libtpu does not know all
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("XLA_FLAGS")
    for name, value in topology.LIBTPU_ENVIRONMENT.items():
      patch.setenv(name, value)
    yield
  jax.config.update("jax_enable_compilation_cache", old)
