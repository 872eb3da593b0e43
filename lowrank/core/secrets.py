"""Keeps secrets out of everything a run writes.

Overrides, configs, arguments and printed text reach disk and trackers in several
ways; each of them passes through here first.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

REDACTED = "<redacted>"
_NAMES = re.compile(
    r"(?i)(^|[_.\-/ ])(api[_-]?key|access[_-]?key|secret\w*|token|password|passwd|"
    r"credentials?|private[_-]?key)($|[_.\-/ ])"
)
_SHAPES = re.compile(
    r"\b(?:sk|pk|hf|ghp|gho|glpat|xox[bp])[-_][A-Za-z0-9_\-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<![0-9a-fA-F])[0-9a-f]{40}(?![0-9a-fA-F])"
)
_ASSIGNED = re.compile(
    r"(?i)([\w.\-]*(?:api[_-]?key|access[_-]?key|secret|token|password|passwd|credential)"
    r"[\w.\-]*\s*[=:]\s*)(\S+)"
)
MIN_SECRET_LENGTH = 8


def is_secret_name(name: str) -> bool:
    """Whether a setting called `name` holds a secret, by its name alone."""
    return _NAMES.search(name) is not None


def environment_secrets() -> tuple[str, ...]:
    """The values of environment variables whose names say that they are secret."""
    return tuple(
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= MIN_SECRET_LENGTH
    )


def redact_text(text: str) -> str:
    """`text` without known secrets, key-shaped words and ``key=value`` secrets."""
    return _redactor()(text)


def redact(value: Any, name: str = "") -> Any:
    """A copy of a nested config in which every secret reads ``<redacted>``."""
    return _redacted(value, name, _redactor())


def redact_contents(value: Any) -> Any:
    """Redacts text by its content only: a metric may well be called loss/token."""
    return _redacted(value, None, _redactor())


def _redactor() -> Callable[[str], str]:
    """`redact_text` for many texts: the environment is read once for all of them."""
    secrets = environment_secrets()

    def redactor(text: str) -> str:
        for value in secrets:
            text = text.replace(value, REDACTED)
        text = _ASSIGNED.sub(lambda found: found[1] + REDACTED, text)
        return _SHAPES.sub(REDACTED, text)

    return redactor


def _redacted(value: Any, name: str | None, redactor: Callable[[str], str]) -> Any:
    """Where the name is None, those of the contents say nothing either."""
    if isinstance(value, Mapping):
        return {
            key: _redacted(item, None if name is None else str(key), redactor)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, name, redactor) for item in value]
    if name and is_secret_name(name) and value not in (None, "", False, True):
        return REDACTED
    return redactor(value) if isinstance(value, str) else value
