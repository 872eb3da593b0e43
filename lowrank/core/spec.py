"""Specs: frozen, keyword-only dataclasses that check their own fields.

A group's YAML is ``name:`` plus fields. A room's catalogue turns the name into the
class, `build` checks the fields. Nothing is imported by a name from a file: a
config that contains ``_target_`` is refused, since it could run any code.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from lowrank.core.errors import BadInput, UnknownName, nearest

_T = TypeVar("_T")
# `alpha: 8` is a float in YAML's eyes and in ours.
_TOWER = BeartypeConf(is_pep484_tower=True)
#: Fields that Flax adds to every module; no config sets them.
_FLAX_FIELDS = frozenset({"parent", "name"})


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def spec(cls: type[_T]) -> type[_T]:
    """Makes `cls` a frozen, keyword-only dataclass that checks its field types.

    What a parent checks in `__post_init__` is checked of a child without one, too.
    """
    own: Any = getattr(cls, "__post_init__", None)

    def __post_init__(self) -> None:
        check_fields(type(self), _values(self))
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@functools.cache
def fields_of(cls: type) -> Mapping[str, Any]:
    """Field name -> annotated type, for a spec or a Flax module."""
    hints = get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    is_module = any(field.name == "parent" for field in fields)
    hidden = _FLAX_FIELDS if is_module else ()
    return {f.name: hints[f.name] for f in fields if f.name not in hidden}


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Checks names and types of `values` against the fields of `cls`.

    Raises:
      BadInput: A field is unknown, missing, or has the wrong type.
    """
    known = fields_of(cls)
    for name, value in values.items():
        if name not in known:
            raise UnknownName(
                f"{cls.__name__} has no field {name!r}. Nearest: "
                f"{nearest(name, known)}. Fields: {', '.join(known) or 'none'}."
            )
        # `true` is a whole number to Python and a mistake in a rank or a rate.
        stray = isinstance(value, bool) and not _holds(known[name], bool)
        if stray or not is_bearable(value, known[name], conf=_TOWER):
            hint = known[name]
            hint = hint.__name__ if isinstance(hint, type) else str(hint)
            raise BadInput(
                f"{cls.__name__}.{name} must be {hint}, not {value!r} "
                f"({type(value).__name__})"
            )
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.name in known
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    }
    if missing := required - set(values):
        raise BadInput(f"{cls.__name__} needs {', '.join(sorted(missing))}")


def _holds(hint: Any, kind: type) -> bool:
    """Whether a type hint names `kind`, alone or among alternatives."""
    return hint in (kind, Any, object) or any(
        choice is kind or type(choice) is kind or _holds(choice, kind)
        for choice in get_args(hint)
    )


def build(
    config: Mapping[str, Any], catalogue: Mapping[str, type[_T]], where: str
) -> _T:
    """Turns ``{name: ..., **fields}`` into an object of the named class.

    Args:
      config: One group of a composed config.
      catalogue: The names a room offers.
      where: The group's name, for messages.

    Raises:
      BadInput: No name, an unknown name or field, a wrong type, or a ``_target_``.
    """
    refuse_targets(config, where)
    fields = dict(config)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in catalogue:
        raise UnknownName(
            f"{where}.name is {name!r}, which is not in the catalogue. Nearest: "
            f"{nearest(str(name), catalogue)}. Known: {', '.join(sorted(catalogue))}."
        )
    cls = catalogue[name]
    try:
        check_fields(cls, fields)
        return cls(**fields)
    except BadInput as error:
        raise type(error)(f"{where}: {error}") from None


def refuse_targets(config: Any, where: str = "config") -> None:
    """Raises if ``_target_`` (or a relative of it) occurs anywhere in `config`."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if str(key).startswith("_") and str(key).endswith("_"):
                raise BadInput(
                    f"{where}.{key} is refused: configs name things from catalogues "
                    "and never import code. Use 'name:', or plugins=[package]."
                )
            refuse_targets(value, f"{where}.{key}")
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            refuse_targets(value, f"{where}[{index}]")


def without_later(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Fields of a `cls`, except later ones that hold the value which changes nothing.

    A class names them in `later`, with the value under which everything is as it was
    before there was the field: what a run is called must not depend on the field then.
    """
    later: Mapping[str, Any] = getattr(cls, "later", {})
    return {
        name: value
        for name, value in values.items()
        if name not in later or value != later[name]
    }


def plain(value: Any) -> Any:
    """`value` as JSON types: specs and modules become ``{"name": class, ...}``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = without_later(_values(value), type(value))
        return {"name": type(value).__name__, **plain(told)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    named = getattr(value, "__qualname__", "<")
    if callable(value) and "<" not in named:
        return f"{value.__module__}.{named}"
    raise BadInput(f"{value!r} ({type(value).__name__}) cannot stand in a record")


def digest(value: Any, length: int = 64) -> str:
    """A hash of a spec that is stable across processes, versions and key order."""
    text = json.dumps(plain(value), sort_keys=True, allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _values(obj: Any) -> dict[str, Any]:
    """Field values; a whole number in a float's place reads as that float."""
    values = {name: getattr(obj, name) for name in fields_of(type(obj))}
    for name, hint in fields_of(type(obj)).items():
        if type(values[name]) is int and _holds(hint, float) and not _holds(hint, int):
            values[name] = float(values[name])
    return values


def dotted(config: Any, name: str = "") -> dict[str, Any]:
    """Every field of a nested config by its dotted name, as a command line has it."""
    if not isinstance(config, Mapping):
        return {name: config}
    found: dict[str, Any] = {}
    for key, item in config.items():
        found |= dotted(item, f"{name}.{key}" if name else str(key))
    return found
