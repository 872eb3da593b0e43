"""The kinds of data that runs know. A kind joins by three functions and an entry."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank.io.decoder_configs import KINDS as DECODERS
from lowrank.io.hub import Base
from lowrank.io.language import Language
from lowrank.io.safetensors import read_json
from lowrank.io.sources import locate
from lowrank.run.answering import answering_again, load_answering
from lowrank.run.choosing import choosing_again, load_choosing
from lowrank.run.continuing import continuing_again, load_continuing
from lowrank.run.labeled import labeled_again, load_labeled, reopen_labeled
from lowrank.run.language import open_language, reopen_language, sequence_inputs
from lowrank.run.pictured import load_pictured, pictured_again, reopen_pictured
from lowrank.run.problem import Problem
from lowrank.run.settings import BaseSpec, Settings
from lowrank.run.texts import open_base, text_inputs
from lowrank.run.valued import load_valued, reopen_valued, valued_again


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a problem of one kind comes to be.

    Attributes:
      load: Loads and checks data and base.
      reopen: (settings, what a result says of the data) -> the base as a finished run
        had it, and an example of its inputs; needs no data.
      again: (settings, that base, what the result says, split) -> one split of the data
        that the settings name, for a finished run's model.
    """

    load: Callable[[Settings], Problem]
    reopen: Callable[[Settings, Mapping[str, Any]], tuple[Base | Language, Any]]
    again: Callable[[Settings, Any, Mapping[str, Any], str], Problem]


#: By the `kind` of a source of data; see `data.tasks` and `data.questions`.
KINDS: Mapping[str, Kind] = {
    "classes": Kind(load_labeled, reopen_labeled, labeled_again),
    "values": Kind(load_valued, reopen_valued, valued_again),
    "answers": Kind(load_answering, reopen_language, answering_again),
    "choices": Kind(load_choosing, reopen_language, choosing_again),
    "images": Kind(load_pictured, reopen_pictured, pictured_again),
    "text": Kind(load_continuing, reopen_language, continuing_again),
}


def load_problem(settings: Settings) -> Problem:
    """Data and base of a trial, loaded and checked.

    Raises:
      BadInput: Anything is missing, damaged or does not fit.
    """
    return KINDS[settings.data.kind].load(settings)


def reopen_base(
    settings: Settings, facts: Mapping[str, Any]
) -> tuple[Base | Language, Any]:
    """The base of a finished run, and an example of its inputs; see `Kind`."""
    return KINDS[settings.data.kind].reopen(settings, facts)


def open_any(
    wanted: BaseSpec, num_classes: int, cache: str | None, shape: tuple[int, int]
) -> tuple[Base | Language, Any]:
    """A base of any kind without data, and inputs of (rows, tokens) for it.

    Args:
      wanted: Its config group.
      num_classes: Width of a new head, where it gets one.
      cache: Folder for downloads; by default the user's.
      shape: Of the inputs, unless the base declares its own.
    """
    if not wanted.source.startswith("python:"):
        folder, _ = locate(wanted.source, cache)
        if read_json(folder / "config.json").get("model_type") in DECODERS:
            return open_language(wanted, cache), sequence_inputs(*shape)
    base = open_base(wanted, num_classes, cache)
    if base.example is None:
        return base, text_inputs(*shape)
    shaped = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return base, jax.tree.map(shaped, base.example)


def load_again(
    settings: Settings, base: Base | Language, facts: Mapping[str, Any], split: str
) -> Problem:
    """One split for a finished run's model; see `Kind`."""
    return KINDS[settings.data.kind].again(settings, base, facts, split)
