"""What a compiled program says between devices, read from its text.

XLA prints the program of one device, with every exchange in it. Here each is found with
its bytes, with how often the loops around it run, and with what it moves: a value that
is nothing but an argument of the program, moved, cast or cut, is that argument (a
weight of the base, a factor), whatever its shape; all else was computed.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: Where a value comes from: an argument's name; None: it was computed. Of a tuple, a
#: tuple of these.
Origin = Any

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
#: What leaves the numbers of a value as they are, or drops some of them.
_MOVES = frozenset(
    {"copy", "bitcast", "reshape", "transpose", "convert", "slice", "dynamic-slice"}
    | {"all-gather", "all-gather-start", "all-gather-done", "copy-start", "copy-done"}
    | {"optimization-barrier", "collective-permute", "bitcast-convert"}
    | {"collective-permute-start", "collective-permute-done", "broadcast", "pad"}
    | {"slice-start", "slice-done", "dynamic-slice-start", "dynamic-slice-done"}
)
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4,
    "u32": 4, "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8,
    "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CONSTANT = re.compile(r"^[su](?:32|64)\[\](?:\{[^}]*\})? constant\((\d+)\)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_PARTS = re.compile(r'custom_call_target="(?:AsyncCollective|ConcatBitcast)')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED = re.compile(r"replica_groups=\{(\{[^=]*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=@?mesh[^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[^=]*?\})\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    Attributes:
      dtype: As XLA has it.
      shape: On one device.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One exchange between devices, as often as it runs.

    Attributes:
      kind: Of `KINDS`.
      arrays: What comes out of it on one device.
      origins: Of each of those, the argument that it is, or None.
      group: Devices that take part together.
      times: How often one step runs it.
      source: Where in the model it was asked for, as JAX names it.
    """

    kind: str
    arrays: tuple[Array, ...]
    origins: tuple[str | None, ...]
    group: int
    times: float
    source: str

    @property
    def bytes(self) -> float:
        """What one device sends in one step, around a ring (Chan et al. 2007)."""
        size = sum(array.bytes for array in self.arrays)
        others = (self.group - 1) / self.group
        # Of a reduce-scatter, the result is one part of what was there.
        factor = {
            "all-reduce": 2 * others,
            "reduce-scatter": self.group - 1.0,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, others)
        return size * factor * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program's text tells.

    Attributes:
      exchanges: All of them, those in loops as often as these run.
      stacked: Bytes of what a loop leaves for another one, an entry per trip: of layers
        that are scanned, what the pass forward keeps for the pass back.
      unbounded: Loops of unknown length; each is counted as one trip.
    """

    exchanges: tuple[Exchange, ...]
    stacked: float
    unbounded: int


def traffic(text: str, num_devices: int) -> Traffic:
    """Reads the text of a compiled program, ``compiled.as_text()``.

    Args:
      text: XLA's, after its optimizations.
      num_devices: That the program runs on, for exchanges of all.
    """
    return _Program(text, num_devices).read()


class _Program:
    """A program's computations, and one walk over them from the entry on."""

    def __init__(self, text: str, num_devices: int):
        self.num_devices = num_devices
        self.computations: dict[str, list[_Instruction]] = {}
        self.entry = ""
        self._found: dict[Any, Exchange] = {}
        self._stacked: dict[str, float] = {}
        self._unbounded = 0
        current: list[_Instruction] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif found := _LINE.match(line):
                current.append(_instruction(found))

    def read(self) -> Traffic:
        self._walk(self.entry, (), 1.0, True)
        stacked = sum(self._stacked.values())
        return Traffic(tuple(self._found.values()), stacked, self._unbounded)

    def _walk(
        self, name: str, given: Sequence[Origin], times: float, collects: bool
    ) -> Origin:
        """Where the result of a computation comes from; its exchanges are noted."""
        known: dict[str, Origin] = {}
        root: Origin = None
        for one in self.computations.get(name, ()):
            origin = self._origin(one, known, given, times, collects)
            known[one.name] = origin
            base = one.kind.removesuffix("-start")
            if collects and base in KINDS:
                self._note(one, base, known, times)
            root = origin if one.is_root else root
        return root

    def _origin(
        self,
        one: _Instruction,
        known: Mapping[str, Origin],
        given: Sequence[Origin],
        times: float,
        collects: bool,
    ) -> Origin:
        operands = [known.get(name) for name in one.operands]
        called = dict(_CALLED.findall(one.text))
        if one.kind == "parameter":
            number = int(one.text.split("parameter(", 1)[1].split(")", 1)[0])
            if number < len(given):
                return given[number]
            named = _OP_NAME.search(one.text)
            return named[1].replace("\\'", "'") if named else None
        if one.kind in ("tuple", "concatenate"):
            return tuple(operands) if one.kind == "tuple" else _joined(operands)
        if one.kind == "get-tuple-element":
            index = int(one.text.rsplit("index=", 1)[1].split(",")[0].split()[0])
            whole = operands[0] if operands else None
            return whole[index] if isinstance(whole, tuple) else None
        if one.kind == "while":
            return self._loop(one, called, operands[0], times, collects)
        if one.kind == "conditional":
            branches = _BRANCHES.search(one.text)
            names = _NAME.findall(branches[1]) if branches else list(called.values())
            ends = [
                self._walk(branch, (own,), times, collects)
                for branch, own in zip(names, operands[1:], strict=False)
            ]
            return _joined(ends)
        if one.kind in ("fusion", "call", "async-start", "custom-call"):
            inside = called.get("calls") or called.get("to_apply")
            if inside is None:
                return _in_parts(one, operands)
            return self._walk(inside, operands, times, collects)
        if one.kind in ("async-update", "async-done"):
            return operands[0] if operands else None
        if one.kind in _MOVES and operands:
            return operands[0]
        return None

    def _loop(
        self,
        one: _Instruction,
        called: Mapping[str, str],
        state: Origin,
        times: float,
        collects: bool,
    ) -> Origin:
        trips = self._trips(one, called)
        # What a trip changes was computed, whatever it was before the first.
        for _ in range(3):
            after = _joined([state, self._walk(called["body"], (state,), times, False)])
            if after == state:
                break
            state = after
        if collects:
            self._unbounded += trips is None
            self._walk(called["body"], (state,), times * (trips or 1), True)
            if trips and trips > 1:
                self._keep(one, called["body"], trips)
        return state

    def _trips(self, one: _Instruction, called: Mapping[str, str]) -> int | None:
        """How often a loop runs: XLA says so, or its condition compares with it."""
        if known := _TRIPS.search(one.text):
            return int(known[1])
        found = []
        for name in self._below(called["condition"]):
            for inner in self.computations.get(name, ()):
                constant = _CONSTANT.match(inner.text)
                found += [int(constant[1])] if constant else []
        return max(found, default=None)

    def _below(self, name: str) -> Iterator[str]:
        yield name
        for one in self.computations.get(name, ()):
            for _, inner in _CALLED.findall(one.text):
                yield from self._below(inner)

    def _keep(self, one: _Instruction, body: str, trips: int) -> None:
        """Notes arrays with an entry per trip that the loop fills."""
        filled = [
            inner.arrays[0]
            for name in self._below(body)
            for inner in self.computations.get(name, ())
            if inner.kind == "dynamic-update-slice"
            and inner.arrays[0].shape[:1] == (trips,)
        ]
        self._stacked[one.name] = sum(array.bytes for array in filled)

    def _note(
        self,
        one: _Instruction,
        kind: str,
        known: Mapping[str, Origin],
        times: float,
    ) -> None:
        arrays = one.arrays
        if one.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
            # Started ones give what went in, and then what comes out.
            arrays = arrays[len(one.operands) : 2 * len(one.operands)]
        origins = tuple(
            origin if isinstance(origin := known.get(name), str) else None
            for name in one.operands
        )
        group = _group(one.text, kind, self.num_devices)
        if group < 2:
            return
        source = _OP_NAME.search(one.text)
        channel = _CHANNEL.search(one.text)
        # What a compiler prints in several parts is one exchange, with one channel.
        key = (kind, channel[1]) if channel else (one.name, times)
        self._found.setdefault(
            key,
            Exchange(kind, arrays, origins, group, times, source[1] if source else ""),
        )


def _instruction(found: re.Match[str]) -> _Instruction:
    text = found[3]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    rest = text[end:].lstrip()
    start = rest.find("(")
    kind = rest[:start].strip()
    inside = rest[start : _closing(rest, start) + 1]
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _ARRAY.findall(text[:end])
    )
    operands = tuple(_NAME.findall(inside))
    return _Instruction(found[2], kind, arrays, operands, text, bool(found[1]))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return len(text) - 1


def _in_parts(one: _Instruction, operands: Sequence[Origin]) -> Origin:
    """Of what a TPU does in parts: the ends of an exchange, or of a copy."""
    if not _PARTS.search(one.text):
        return None
    named = {origin for operand in operands for origin in _flat(operand)} - {None}
    origin = named.pop() if len(named) == 1 else None
    return (origin,) * len(one.arrays) if one.text.startswith("(") else origin


def _flat(origin: Origin) -> Iterator[str | None]:
    if isinstance(origin, tuple):
        for part in origin:
            yield from _flat(part)
    else:
        yield origin


def _joined(origins: Sequence[Origin]) -> Origin:
    """What all of them are; None where they differ."""
    first, *others = origins
    if isinstance(first, tuple):
        if not all(isinstance(o, tuple) and len(o) == len(first) for o in others):
            return None
        return tuple(_joined(parts) for parts in zip(*origins, strict=True))
    return first if all(other == first for other in others) else None


def _group(text: str, kind: str, num_devices: int) -> int:
    """How many devices take part in an exchange."""
    if kind == "collective-permute":
        found = _PAIRS.search(text)
        pairs = re.findall(r"\{(\d+),(\d+)\}", found[1]) if found else [("0", "1")]
        return 2 if any(a != b for a, b in pairs) else 1
    if iota := _IOTA.search(text):
        return int(iota[1].split(",")[-1])
    if listed := _LISTED.search(text):
        first = listed[1].split("}")[0].strip("{")
        return len(first.split(",")) if first else num_devices
    if named := _NAMED.search(text):
        return _named_group(text, named[1]) or num_devices
    return num_devices


def _named_group(text: str, axes: str) -> int | None:
    """Groups as axes of a mesh: the product of the sizes of those named."""
    sizes = dict(re.findall(r"[\"']?(\w+)[\"']?=(\d+)", text))
    names = re.findall(r"\w+", axes)
    if not names or not all(name in sizes for name in names):
        return None
    return math.prod(int(sizes[name]) for name in names)
