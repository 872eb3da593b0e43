"""One step directory, written and read by Orbax: the only file that knows its API.

The interface used is `orbax.checkpoint.experimental.v1`. Its free functions write one
directory each; its manager is not used, because it lists and deletes by name alone.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from lowrank.core.trees import leaf_digest
from lowrank.io.integrity import Integrity, Leaf, escape
from lowrank.sharding.mesh import put
from lowrank.sharding.processes import on_host, trouble

#: Inside a step: what Orbax writes last, and our list of hashes.
MARKER = "commit_success.txt"
INTEGRITY_FILE = "integrity/data.json"
_STATE = "state"
_INTEGRITY = "integrity"
_MAX_REASON_LENGTH = 300


def start(
    directory: Path, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]
) -> Callable[[], None]:
    """Begins to write a step and returns at once.

    Args:
      directory: Does not exist yet. A temporary name is renamed to it at the end.
      arrays: Joined path -> array, not to be changed until the end. Empty ones are
        left out, since Orbax refuses them and their description suffices.
      document: JSON for `INTEGRITY_FILE`.

    Returns:
      A function that waits for the end and raises what went wrong.
    """
    items: dict[str, Any] = {_INTEGRITY: document}
    if state := {escape(path): array for path, array in arrays.items() if array.size}:
        items[_STATE] = state
    with _context():
        return ocp.save_checkpointables_async(os.fspath(directory), items).result


def load(
    directory: Path, record: Integrity, wanted: Mapping[str, Any]
) -> dict[str, jax.Array] | str:
    """Reads the leaves of a step and compares each with its hash.

    Args:
      directory: A finished step.
      record: Its list of hashes.
      wanted: Joined path -> leaf with the stored shape and dtype, and the sharding to
        read it onto.

    Returns:
      Joined path -> array; or, of a damaged step, the reason as text.
    """
    abstract = {
        escape(path): _stored_form(leaf, record.leaves[path])
        for path, leaf in wanted.items()
        if record.leaves[path].num_elements
    }
    raw: Mapping[str, jax.Array] = {}
    if abstract:
        with _quiet_asyncio():
            failure = None
            try:
                with _context():
                    items = ocp.load_checkpointables(
                        os.fspath(directory), {_STATE: abstract}
                    )
                raw = items[_STATE]
            except Exception as error:
                # Damage surfaces as any class, from KeyError to a C++ status; so does
                # a signal, which Orbax wraps, and which says nothing of the step.
                if isinstance(_first(error), KeyboardInterrupt):
                    raise _first(error) from None
                failure = f"Orbax cannot read it: {_root(error)}"
            if failure is not None:
                # Its tasks complain when they are collected, so that is done in here.
                gc.collect()
            # Of several processes all go on with this step, or none.
            if (failure := trouble(failure)) is not None:
                return failure
    leaves = {}
    for path, leaf in wanted.items():
        stored = record.leaves[path]
        if not stored.num_elements:
            array = jnp.zeros(leaf.shape, leaf.dtype)
            leaves[path] = put(array, _sharding(leaf))
            continue
        array = raw[escape(path)]
        if leaf_digest(path, on_host(array)) != stored.sha256:
            return f"leaf {path} does not have the stored hash"
        if stored.key_impl is not None:
            array = jax.random.wrap_key_data(array, impl=stored.key_impl)
            array = jax.device_put(array, _sharding(leaf))
        leaves[path] = array
    return leaves


def _first(error: BaseException) -> BaseException:
    """The first error of a chain; Orbax wraps it in pages of its own."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _root(error: BaseException) -> str:
    """The first error of a chain on one line."""
    error = _first(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:_MAX_REASON_LENGTH]


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_INTEGRITY)
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _stored_form(leaf: Any, stored: Leaf) -> jax.ShapeDtypeStruct:
    """What Orbax is to read for `leaf`: of typed keys, their data."""
    form = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if stored.key_impl is not None:
        form = jax.eval_shape(jax.random.key_data, form)
    return jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=_sharding(leaf))


class _OrbaxBelowError(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "orbax" not in record.pathname


class _Unretrieved(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()


def quiet_orbax() -> None:
    """Drops Orbax's messages below ERROR; it logs dozens of lines per save."""
    logger = logging.getLogger("absl")
    if not any(isinstance(one, _OrbaxBelowError) for one in logger.filters):
        logger.addFilter(_OrbaxBelowError())


@contextmanager
def _quiet_asyncio() -> Iterator[None]:
    """Hides the echoes of a failed restore, whose error the caller does report."""
    logger, echo = logging.getLogger("asyncio"), _Unretrieved()
    logger.addFilter(echo)
    try:
        yield
    finally:
        logger.removeFilter(echo)
