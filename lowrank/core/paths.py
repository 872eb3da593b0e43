"""What a weight is called, and how patterns select weights by name.

A path joins the keys of a tree with "/": ``encoder/layer/query/kernel``. Patterns
are globs over whole paths:

  ``*``        any text inside one segment           ``**/kernel``
  ``**``       zero or more whole segments           ``head/**``
  ``?``        one character inside a segment
  ``{a,b}``    alternatives                          ``**/{query,value}/kernel``
  ``[...]``    layers of a stack, as Python counts   ``**/layer[4:8]/**``

A stacked weight is one leaf that holds the weights of many layers. A bracket at the
end of a segment takes some of them: ``[3]``, ``[-1]``, ``[:4]``, ``[::2]``. The weight
has one axis of layers, so any segment of its path may carry the bracket, but only one:
write it where it reads best. The name of a single layer carries it at a fixed place,
after the segment that names the stack: ``encoder/layer[3]/query/kernel``.

A pattern that selects nothing is an error, because a typing mistake that silently
trains nothing is the most expensive kind.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import jax

from lowrank.core.errors import BadInput, UnknownName, nearest

MAX_PATTERN_LENGTH = 512
_TOKENS = re.compile(r"(\*\*/|/\*\*|\*\*|\*|\?|\{[^{}/]*\}|[^*?{}/]+|.)")
_BRACKET = re.compile(r"\[([^\[\]/]*)\](?=/|$)")
_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers that a bracket takes of every stack it meets.

    Attributes:
      text: What stands between the brackets: a number, or a slice `start:stop:step`.
    """

    text: str

    def of(self, count: int) -> tuple[int, ...]:
        """The layers taken of a stack of `count`, in rising order.

        Raises:
          BadInput: A number is no layer of that stack, or none is taken.
        """
        numbers = [int(one) if one else None for one in self.text.split(":")]
        # A bound may stand behind the last layer, a single layer may not.
        last = count - 1 if len(numbers) == 1 else count
        for bound in numbers[:2]:
            if bound is not None and not -count <= bound <= last:
                raise BadInput(
                    f"[{self.text}] goes beyond a stack of {count} layers; they are "
                    f"numbered 0 to {count - 1}, or -{count} to -1 from the end"
                )
        if len(numbers) == 1:
            return (range(count)[numbers[0]],)  # type: ignore[index]
        taken = tuple(sorted(range(count)[slice(*numbers)]))
        if not taken:
            raise BadInput(
                f"[{self.text}] takes none of {count} layers; as in Python, the end of "
                "a slice is not part of it"
            )
        return taken


def path_of(keys: tuple) -> str:
    """The joined path of a leaf from the key path that JAX gives."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def layer_path(path: str, segment: int, layer: tuple[int, ...]) -> str:
    """The name of one layer of the weight at `path`.

    Args:
      path: Of the stacked weight, such as "encoder/layer/query/kernel".
      segment: Number of the segment that names the stack; 1 is "layer" here.
      layer: Its number, one per axis of layers: "encoder/layer[3]/query/kernel".
    """
    parts = path.split("/")
    parts[segment] += f"[{','.join(map(str, layer))}]"
    return "/".join(parts)


@functools.lru_cache(maxsize=1024)
def layers_of(pattern: str) -> Layers | None:
    """Which layers of a stack a pattern takes; None if it has no bracket.

    Raises:
      BadInput: There is more than one bracket, it is no number and no slice, or it
        does not stand at the end of a segment that names something.
    """
    if not set(pattern) & set("[]"):
        return None
    found = _BRACKET.findall(pattern)
    if len(found) != 1 or set(_BRACKET.sub("", pattern)) & set("[]"):
        raise BadInput(
            f"pattern {pattern!r} has a bracket out of place: one pair may end one "
            "segment, as in '**/layer[4:8]/**'. Where a name itself has a bracket, "
            "write '?' for it."
        )
    if "**[" in pattern or pattern.startswith("[") or "/[" in pattern:
        raise BadInput(
            f"pattern {pattern!r} has a bracket that follows no name; it ends the "
            "segment of a stack, as in '**/layer[4:8]/**' or '**/*[0]/kernel'"
        )
    numbers = found[0].split(":")
    fits = all(_NUMBER.fullmatch(one) for one in numbers if one)
    if not fits or len(numbers) > 3 or numbers == [""]:
        raise BadInput(
            f"pattern {pattern!r} has [{found[0]}], which is no layer and no slice of "
            "layers: write [3], [-1], [4:8] or [::2]"
        )
    if len(numbers) == 3 and numbers[2] and int(numbers[2]) == 0:
        raise BadInput(f"pattern {pattern!r} has a slice with step 0; use 1 or more")
    return Layers(found[0])


@functools.lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Turns a glob into a regular expression for `fullmatch`.

    A bracket plays no part: a pattern covers the weights of which it takes layers.

    Raises:
      BadInput: The pattern is empty or too long, or a brace or a bracket is out of
        place.
    """
    if not pattern or len(pattern) > MAX_PATTERN_LENGTH:
        raise BadInput(
            f"a pattern has 1 to {MAX_PATTERN_LENGTH} characters, not {len(pattern)}"
        )
    if layers_of(pattern) is not None:
        return compile_pattern(_BRACKET.sub("", pattern))
    if any("**" in part and part != "**" for part in pattern.split("/")):
        raise BadInput(
            f"pattern {pattern!r} has a '**' that shares its segment with other text; "
            "it stands alone between slashes, as in '**/kernel' or 'head/**'"
        )
    parts = []
    for token in _TOKENS.findall(pattern):
        if token == "**/":
            parts.append("(?:[^/]+/)*")
        elif token == "/**":
            parts.append("(?:/[^/]+)*")
        elif token == "**":
            parts.append(".*")
        elif token == "*":
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif token.startswith("{") and token.endswith("}"):
            choices = token[1:-1].split(",")
            parts.append("(?:" + "|".join(map(_literal, choices)) + ")")
        elif token in "{}":
            raise BadInput(f"pattern {pattern!r} has an unbalanced or nested brace")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts))


def _literal(choice: str) -> str:
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(letter, re.escape(letter)) for letter in choice)


def matches(pattern: str, path: str) -> bool:
    """Whether the glob `pattern` covers the whole of `path`, or layers of it."""
    return compile_pattern(pattern).fullmatch(path) is not None


def select(pattern: str, paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that `pattern` covers, in the order given.

    Raises:
      UnknownName: No path is covered; names the nearest ones.
    """
    paths = tuple(paths)
    found = tuple(path for path in paths if matches(pattern, path))
    if not found:
        raise UnknownName(
            f"pattern {pattern!r} matches none of {len(paths)} weights. Nearest: "
            f"{nearest(pattern, paths)}. A pattern covers whole paths: write "
            "'**/name' to reach a suffix."
        )
    return found
