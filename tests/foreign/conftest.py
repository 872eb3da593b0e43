"""The suite of foreign models: its oracle, and the table it writes."""

import os
import sys
from pathlib import Path

import jax
import pytest

os.environ["KERAS_BACKEND"] = "jax"
sys.path.insert(0, str(Path(__file__).parents[1] / "adapt"))

from unusable import UNUSABLE

# These models were written where JAX broadcasts across ranks.
jax.config.update("jax_numpy_rank_promotion", "allow")

FOUND = pytest.StashKey[list]()
OPTION = "--write-model-table"
HEAD = """# Models of other packages

Written by `make docs-models`, which adapts every model below: a rank-2 correction on
every weight that can be adapted, compared with the same model on dense weights. The
error is the largest over outputs and gradients, relative to each array's own size (to
one hundredth of the largest array where that is more), in float32.

Where a weight is not adapted, the primitive says why: biases of heads and position
tables are added, not multiplied; masked or elementwise weights (`mul`) have no factored
form. `python -m experiments.sites` tells the same of your model.

Found and fixed with them: a row looked up under `vmap` (ESM-2) was taken for a use of
the whole table; axes numbered by NumPy integers (ESM-2) were refused; a loop of unknown
length with a derivative rule of its own (diffrax by default) is now refused by name
instead of failing when its gradient is taken.

| package | model | written in | uses | weights | adapted | not adapted | error |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
## Tried and not usable

With jax {jax} and flax {flax}, on Python 3.11. None of these reached our code.

| package | what happened |
|---|---|
"""


def pytest_addoption(parser):
    parser.addoption(OPTION, help="write the table of models to this file")


def pytest_configure(config):
    config.stash[FOUND] = []


@pytest.fixture
def models(request):
    """Call it with what was found of a model; it becomes a row of the table."""
    rows = request.config.stash[FOUND]
    return lambda **found: rows.append(found)


def row(one):
    refused = ", ".join(f"{n} ({name})" for name, n in sorted(one["refused"].items()))
    return (
        f"| {one['package']} {one['version']} | {one['name']} | {one['framework']} "
        f"| {', '.join(one['kinds'])} | {one['weights']} | {one['adapted']} "
        f"| {refused or 'none'} | {one['error']:.0e} |\n"
    )


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption(OPTION)
    if not path or exitstatus:
        return
    import flax

    tail = TAIL.format(jax=jax.__version__, flax=flax.__version__)
    rows = "".join(map(row, session.config.stash[FOUND]))
    lost = "".join(f"| {name} | {reason} |\n" for name, reason in UNUSABLE.items())
    Path(path).write_text(HEAD + rows + tail + lost)
