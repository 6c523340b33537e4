"""What a compiled program says between devices: its collectives, read from XLA's text."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    axes: frozenset[str]  # mesh axes over which its devices differ
    looped: bool  # inside a while loop


KINDS = r"all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns the collectives in the text of a compiled program, with the axes they cross."""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and (name := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            bodies[name[1]] = lines = []
        elif line.startswith("  ") and bodies:
            lines.append(line)
    calls = {
        name: {w for line in lines for w in re.findall(r"[\w.\-]+", line)}
        & bodies.keys()
        for name, lines in bodies.items()
    }
    looped: set[str] = set()
    todo = re.findall(r"body=%?([\w.\-]+)", text)
    while todo:
        if (name := todo.pop()) not in looped:
            looped.add(name)
            todo += calls[name]
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if kind := re.search(rf" ({KINDS})(?:-start)?\(", line):
                axes = _crossed(line, mesh)
                found.append(Collective(kind[1], axes, name in looped))
    return found


def _crossed(line: str, mesh: jax.sharding.Mesh) -> frozenset[str]:
    groups = _groups(line, mesh.size)
    crossed = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group), mesh.devices.shape)
        crossed |= {
            n for n, x in zip(mesh.axis_names, places, strict=True) if np.ptp(x)
        }
    return frozenset(crossed)


def _groups(line: str, devices: int) -> Any:
    """The groups of devices of a collective, in any of the ways that XLA writes them."""
    if iota := re.search(r"groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape(_ints(iota[2]))
        return (ids.transpose(_ints(iota[3])) if iota[3] else ids).reshape(
            _ints(iota[1])
        )
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
        return ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(inside) :]))
    if listed := re.search(r"(?:groups|pairs)=\{(\{[\d,{} ]+\})\}", line):
        return [_ints(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    assert "groups={}" in line, f"no groups of devices understood: {line[:400]}"
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
