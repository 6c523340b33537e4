"""What a compiled program sends between devices: its collectives, read from XLA's text.

Bytes are those that one device receives, with the algorithm that moves least: a ring for sums and
gathers. They are counted from the operands, so that any way to write a collective gives the same.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.config import ConfigError

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)
# Bits of an entry, by XLA's name of the type; f8e4m3fn and its like have their own in the name.
BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str  # of `KINDS`
    axes: frozenset[str]  # mesh axes over which its devices differ
    devices: int  # of one group
    looped: bool  # inside a while loop
    operands: tuple[tuple[str, int], ...]  # (dtype, bytes on a device) of each
    times: int | None  # it runs in one call; None: a loop's count is not in the text
    name: str  # of the operation that it comes from, as jax calls it

    @property
    def bytes(self) -> float:
        """Bytes that a device receives by it in one call of the program.

        Raises:
            ValueError: how often it runs is not known.
        """
        return sum(self.by_dtype().values())

    def by_dtype(self) -> dict[str, float]:
        """Returns these bytes by dtype."""
        if self.times is None:
            raise ValueError(f"{self.kind} ({self.name}): in a loop of unknown length")
        found: Counter[str] = Counter()
        for dtype, size in self.operands:
            found[dtype] += self.times * received(self.kind, self.devices, size)  # type: ignore[assignment]
        return dict(found)


def received(kind: str, devices: int, operand: float) -> float:
    """Returns the bytes that a device receives at least, from those of its operand.

    Of n devices: a sum sends each part round to be added up and round again, 2 (n-1)/n; its
    first half is a reduce-scatter. An all-gather's operand is a share, n-1 others come. An
    all-to-all keeps 1/n; of a permute all is new.
    """
    n = devices
    if n == 1:
        return 0.0
    share = {
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-gather": n - 1.0,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
        "collective-permute": 1.0,
    }
    return share[kind] * operand


def totals(found: Iterable[Collective]) -> dict[tuple[str, frozenset[str]], float]:
    """Returns the bytes that a device receives, by kind and mesh axes."""
    sums: dict[tuple[str, frozenset[str]], float] = {}
    for c in found:
        sums[c.kind, c.axes] = sums.get((c.kind, c.axes), 0.0) + c.bytes
    return sums


def read(text: str, mesh: Any) -> list[Collective]:
    """Returns the collectives in the text of a compiled program, with the axes they cross.

    A pair of -start and -done is one; one that stands in several places is several; one that is
    called from several places runs as often as all of them.

    Args:
        text: `as_text()` of a compiled program.
        mesh: that it was compiled for.
    """
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    found = []
    for name, lines in bodies.items():
        if name not in times:  # nothing calls it
            continue
        shapes: dict[str, str] | None = None
        for line in lines:
            if not (op := _OP.search(line)):
                continue
            shapes = _shapes(lines) if shapes is None else shapes
            groups = _groups(line, mesh.size)
            count, looped = times[name]
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind=op[1],
                    axes=_crossed(groups, mesh),
                    devices=_group_size(op[1], groups),
                    looped=looped,
                    operands=tuple(_operands(line[op.end() :], shapes)),
                    times=count,
                    name=origin[1] if origin else "",
                )
            )
    return found


_OP = re.compile(rf" ({'|'.join(KINDS)})(?:-start)?\(")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation, and the name of the one that is the program."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) ", line)
        if line.endswith("{") and start:
            bodies[start[2]] = lines = []
            entry = start[2] if start[1] else entry
        elif line.startswith("  ") and bodies:
            lines.append(re.sub(r"/\*.*?\*/", "", line))
    return bodies, entry


def _times(
    bodies: dict[str, list[str]], entry: str
) -> dict[str, tuple[int | None, bool]]:
    """Returns how often each computation that is reached runs, and whether in a loop."""
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    found: dict[str, tuple[int | None, bool]] = {}
    # Callers before what they call, so that all of a computation's calls are known at its turn.
    for name in _ordered(calls, entry):
        found.setdefault(name, (1, False))
        count, looped = found[name]
        for called, trips in calls[name]:
            more = 1 if trips is None else trips()
            product = None if count is None or more is None else count * more
            if called in found:
                before = found[called]
                total = (
                    None
                    if before[0] is None or product is None
                    else before[0] + product
                )
                found[called] = total, before[1] or looped or trips is not None
            else:
                found[called] = product, looped or trips is not None
    return found


def _ordered(calls: dict[str, list[Any]], entry: str) -> list[str]:
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for called, _ in calls[name]:
                visit(called)
            done[name] = None

    visit(entry)
    return list(done)[::-1]


def _calls(lines: list[str], bodies: dict[str, list[str]]) -> Iterator[Any]:
    """Yields what a computation calls: (name, None), or of a loop (name, its trip count)."""
    for line in lines:
        if re.search(r"-(?:done|update)\(", line):  # of a pair whose start calls it
            continue
        loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
        if loop:
            yield loop[2], lambda line=line, test=loop[1]: _trips(line, bodies, test)
        names = re.search(r"(?:calls|to_apply|called_computations)=%?([\w.\-]+)", line)
        if names and names[1] in bodies:
            yield names[1], None
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        for name in re.findall(r"[\w.\-]+", branches[1]) if branches else ():
            yield name, None
        for name in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line):
            yield name, None


def _trips(line: str, bodies: dict[str, list[str]], test: str) -> int | None:
    """Returns how often a loop runs: as XLA says, or as its condition does; None: unknown."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', line):
        return int(known[1])
    # A scan counts from 0 while below a constant.
    inside = "\n".join(bodies[test])
    for name in re.findall(r"calls=%?([\w.\-]+)", inside):
        inside += "\n".join(bodies[name])
    limits = re.findall(r" s32\[\][^ ]* constant\((\d+)\)", inside)
    compared = re.findall(r"direction=(\w+)", inside)
    return int(limits[0]) if len(limits) == 1 and compared == ["LT"] else None


def _shapes(lines: list[str]) -> dict[str, str]:
    """Returns the type of each instruction, as written."""
    found = (re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(", x) for x in lines)
    return {m[1]: m[2] for m in found if m}


def _operands(rest: str, shapes: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yields dtype and bytes of the arrays among a collective's operands."""
    depth, end = 1, 0
    while depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside = rest[: end - 1]
    names = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"[\w.\-]+", inside)
    for name in names:
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes[name]):
            yield dtype, math.prod(_ints(dims) if dims else []) * _bits(dtype) // 8


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if not found:
        raise ValueError(f"no type of XLA's: {dtype}")
    return int(found[1])


def _group_size(kind: str, groups: Sequence[Sequence[int]]) -> int:
    if kind == "collective-permute":  # of pairs: is there one that sends?
        return 1 + any(len(set(pair)) > 1 for pair in groups)
    return max(len(group) for group in groups)


def _crossed(groups: Sequence[Sequence[int]], mesh: Any) -> frozenset[str]:
    crossed: set[str] = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group), tuple(mesh.shape.values()))
        crossed |= {
            n for n, x in zip(mesh.axis_names, places, strict=True) if np.ptp(x)
        }
    return frozenset(crossed)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective, in any of the ways that XLA writes them."""
    if iota := re.search(r"groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape(_ints(iota[2]))
        ids = ids.transpose(_ints(iota[3])) if iota[3] else ids
        return ids.reshape(_ints(iota[1])).tolist()
    named = (
        r"groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" ?\{([^}]*)\}"
    )
    if named := re.search(named, line):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = np.arange(devices)
        if named[2]:
            ids = ids.reshape(_ints(named[2]))
            ids = ids.transpose(_ints(named[3])) if named[3] else ids
        ids = ids.reshape([int(n) for _, n in axes])
        assert ":" not in named[4], f"a part of a mesh axis: {line[:400]}"
        inside = [
            [a for a, _ in axes].index(a) for a in re.findall(r"'(\w+)'", named[4])
        ]
        ids = np.moveaxis(ids, inside, range(-len(inside), 0))
        size = math.prod(ids.shape[ids.ndim - len(inside) :])
        return ids.reshape(-1, size).tolist()
    if listed := re.search(r"(?:groups|pairs)=\{(\{[\d,{} ]+\})\}", line):
        return [_ints(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    if "pairs={}" in line:
        raise ConfigError(
            "the compiled program replaces a transfer by zeros (a collective-permute from nobody "
            "to nobody): XLA has made another program of this one"
        )
    assert "groups={}" in line, f"no groups of devices understood: {line[:400]}"
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
