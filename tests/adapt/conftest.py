"""Settings of this folder's tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    """Almost everything runs once: optimizing it costs more than it saves."""
    optimized = getattr(request.module, "OPTIMIZED", False)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
