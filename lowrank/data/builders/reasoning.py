"""Tasks of reasoning-gym: questions that are drawn, and verifiers that score answers.

A verifier sees what a model said. Some of the package's verifiers evaluate that text as
Python or as a formula of sympy, which runs whatever a model may say; a task is taken
only if nothing that its verifier can reach does so (`reaches`). Rows must come again
from their seed, in any process: tasks whose rows do not are not taken either.

Source: Stojanovski et al., 2025, https://arxiv.org/abs/2505.24760
"""

import copy
import dataclasses
import dis
import importlib
import importlib.metadata
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowrank.core.errors import BadInput, UnknownName, nearest

PACKAGE = "reasoning-gym"
_MODULE = "reasoning_gym"
_REMEDY = "pip install 'lowrank[gym]'"
#: What a config of the package has beside parameters.
_OURS = ("seed", "size")
#: Draws for each row that is wanted, and some more.
_DRAWS, _MORE = 8, 64
#: Builtins that run a text, or find something by one.
_RUN = frozenset(
    {"eval", "exec", "compile", "__import__", "open", "getattr", "globals", "locals",
     "vars", "input", "breakpoint"}
)  # fmt: skip
#: Packages that run no text: what verifiers may use.
_HARMLESS = frozenset(
    {"collections", "copy", "dataclasses", "decimal", "enum", "fractions", "functools",
     "itertools", "json", "math", "numpy", "random", "re", "string", "typing",
     "warnings"}
)  # fmt: skip
#: Tasks whose rows depend on the order of a set, which every process has of its own.
RESTLESS = frozenset(
    {"isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"}
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rows of a task.

    Attributes:
      entries: As the package gives them: "question", "answer", "metadata".
      keys: What makes questions equal: their words.
      score: (what was said, entry) -> what the package's verifier makes of it, 0 to 1.
      left_out: How many draws had no answer that their own verifier takes for right.
    """

    entries: tuple[Mapping[str, Any], ...]
    keys: tuple[str, ...]
    score: Callable[[str, Mapping[str, Any]], float]
    left_out: int


def version() -> str:
    """Of the installed package.

    Raises:
      BadInput: It is missing.
    """
    _known()
    return importlib.metadata.version(PACKAGE)


def usable(task: str) -> None:
    """Refuses a task that cannot be taught or judged.

    Raises:
      UnknownName: There is no such task.
      BadInput: Its verifier may run what a model says, its rows differ from process to
        process, or the package is missing.
    """
    known = _known()
    if task not in known:
        raise UnknownName(
            f"data.task = {task!r} is no task of {PACKAGE} {version()}. Nearest: "
            f"{nearest(task, known)}."
        )
    found = known[task][0]
    if task == "composite":
        raise BadInput("data.task = 'composite' is made of others: name one of them")
    if task in RESTLESS:
        raise BadInput(
            f"data.task = {task!r}: its rows depend on more than the seed, so that a "
            "finished run could not be judged again; choose another task"
        )
    if any("exec" in _names(f.__code__) for f in _functions(found)):
        raise BadInput(
            f"data.task = {task!r} runs programs to make its rows; choose another task"
        )
    if reached := reaches(found):
        raise BadInput(
            f"data.task = {task!r}: its verifier may run what a model says (it reaches "
            f"{', '.join(reached)}); choose another task"
        )


def reaches(found: type) -> list[str]:
    """What the verifier of a class reaches that could run a text.

    Read from compiled functions: builtins that run texts, and anything out of packages
    that are not known to be harmless. Functions, methods and classes of reasoning-gym
    are followed; objects that an instance holds are not.
    """
    reached: set[str] = set()
    seen: set[types.CodeType] = set()
    house = found.__module__.partition(".")[0]
    todo: list[tuple[Any, type | None]] = [(getattr(found, "score_answer"), found)]  # noqa: B009
    while todo:
        given, owner = todo.pop()
        function = _plain(given)
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = _names(function.__code__)
        reached |= {n for n in _imported(function.__code__) if not _harmless(n)}
        for name in sorted(names):
            if owner is not None and hasattr(owner, name):
                todo.append((inspect.getattr_static(owner, name), owner))
            if name not in function.__globals__:
                reached |= {name} & _RUN
                continue
            for value in _contents(function.__globals__[name]):
                home = _home(value)
                if home is None or _harmless(home):
                    continue
                if home == "builtins":
                    reached |= {getattr(value, "__name__", name)} & _RUN
                elif home.partition(".")[0] not in (_MODULE, house):
                    reached.add(f"{home}.{name}")
                elif isinstance(value, types.ModuleType):
                    todo += [(getattr(value, inner, None), None) for inner in names]
                elif isinstance(value, type):
                    todo += [(each, value) for each in vars(value).values()]
                else:
                    todo.append((value, None))
    return sorted(reached)


def draw(
    task: str,
    config: Mapping[str, Any],
    *,
    seed: int,
    rows: int,
    taken: set[str],
    what: str,
) -> Drawn:
    """Rows of a task with questions that are new; `taken` learns them.

    Args:
      task: One that is `usable`.
      config: Its parameters.
      seed: The package draws row n from seed + n: seeds must lie far apart.
      rows: How many.
      taken: Questions that other splits have.
      what: Name of the split, for messages.

    Raises:
      UnknownName: The task has no such parameter.
      BadInput: A parameter is out of range, or there are too few questions.
    """
    most = _DRAWS * rows + _MORE
    made = _made(task, config, seed, most)
    score = _Score(made)
    entries, keys, left_out, draws = [], [], 0, 0
    for entry in _each(made, most, task):
        if len(entries) == rows:
            break
        draws += 1
        question, answer = entry["question"], entry["answer"]
        key = " ".join(question.split())
        if key in taken:
            continue
        if not isinstance(answer, str) or score(answer.strip(), entry) != 1.0:
            left_out += 1
            continue
        taken.add(key)
        entries.append(entry)
        keys.append(key)
    if len(entries) < rows:
        raise BadInput(
            f"data.{what}_rows = {rows}, but {draws} draws of {task!r} gave "
            f"{len(entries)} questions that differ from each other and from those of "
            f"other splits ({left_out} had no answer that the verifier takes for "
            "right); ask for fewer rows, or allow more questions by data.config"
        )
    return Drawn(tuple(entries), tuple(keys), score, left_out)


@dataclasses.dataclass(frozen=True)
class _Score:
    """The verifier of a task, whatever it is told."""

    made: Any

    def __call__(self, said: str, entry: Mapping[str, Any]) -> float:
        """From 0 to 1; 0 for what it cannot read."""
        try:
            # Its own, so that no verifier leaves a mark for the next.
            found = float(self.made.score_answer(said, copy.deepcopy(dict(entry))))
        except Exception:
            return 0.0
        return found if 0.0 <= found <= 1.0 else 0.0


def _known() -> Mapping[str, tuple[type, type]]:
    """Classes of all tasks and of their configs."""
    try:
        importlib.import_module(_MODULE)
        return importlib.import_module(f"{_MODULE}.factory").DATASETS
    except ImportError as error:
        raise BadInput(
            f"data=reasoning_gym needs the extra: {_REMEDY} ({error})"
        ) from None


def _made(task: str, config: Mapping[str, Any], seed: int, size: int) -> Any:
    known = {field.name for field in dataclasses.fields(_known()[task][1])}
    for name in config:
        if name in _OURS:
            raise BadInput(
                f"data.config.{name} follows from data.seed and the rows that are "
                "wanted: leave it out"
            )
        if name not in known:
            raise UnknownName(
                f"{task!r} has no parameter {name!r}. Nearest: {nearest(name, known)}."
            )
    create = importlib.import_module(_MODULE).create_dataset
    try:
        return create(task, **config, seed=seed, size=size)
    except Exception as error:
        # The package checks by assertions.
        raise BadInput(
            f"{task!r} cannot be made with {dict(config)}: "
            f"{error or type(error).__name__}"
        ) from error


def _each(made: Any, most: int, task: str) -> Iterator[Mapping[str, Any]]:
    for number in range(most):
        try:
            yield made[number]
        except Exception as error:
            raise BadInput(
                f"{task!r} fails at draw {number}: {error or type(error).__name__}; "
                "choose other parameters by data.config"
            ) from error


def _harmless(module: str) -> bool:
    return module.partition(".")[0] in _HARMLESS


def _home(value: Any) -> str | None:
    """The module that a value comes from; constants have none, and run nothing."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else None


def _contents(value: Any) -> list[Any]:
    """A value, or what a table of values holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _imported(code: types.CodeType) -> set[str]:
    """Modules that a function imports by itself."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return own.union(*map(_imported, inner))


def _plain(value: Any) -> types.FunctionType | None:
    """The function behind a method or a property."""
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, "__func__", value))
    return value if isinstance(value, types.FunctionType) else None


def _functions(found: type) -> list[types.FunctionType]:
    plain = map(_plain, vars(found).values())
    return [function for function in plain if function is not None]


def _names(code: types.CodeType) -> set[str]:
    """Globals and attributes that a function names, inner functions included."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names}.union(*map(_names, inner))
