"""Kernels of a program in their order: which of them matter, and what memory holds meanwhile."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Total:
    """Of one run of a program on one device."""

    flops: float  # of products; a multiply-add is two
    traffic: float  # bytes read from and written to its memory
    peak: int  # bytes that it holds at once beside its arguments
    gathered: int  # of these, what collectives make
    waited: float = 0.0  # bytes of the traffic that do not pass beside products
    loops: tuple["Total", ...] = ()  # of one turn of each scan


class Buffer:
    """An array in memory."""

    __slots__ = ("held", "moved", "size")

    def __init__(self, size: int, held: bool = False, moved: bool = False):
        self.size = size  # bytes
        self.held = held  # by whoever runs the program: not counted
        self.moved = moved  # made by a collective


@dataclasses.dataclass(eq=False)
class Kernel:
    """Something that reads arrays and writes arrays."""

    reads: Mapping[Buffer, int]  # and how many bytes of each
    writes: tuple[Buffer, ...]
    flops: float = 0.0
    traffic: float | None = None  # bytes; None: what is read and written
    inner: int = 0  # bytes held inside
    gathered: int = 0  # of these, by collectives
    waited: float | None = None  # of a loop, see `Total`
    fused: bool = False  # elementwise: may write where it reads
    into: Buffer | None = None  # changed in its place


def total(
    kernels: Sequence[Kernel],
    outs: Sequence[Buffer],
    carried: int | None = None,
    late: bool = False,
    loops: Sequence[Total] = (),
    beside: float = 0.0,
) -> Total:
    """Returns what kernels cost of which results need something.

    Args:
        kernels: in their order.
        outs: the results.
        carried: the first so many of them stay to the end, the others go where they are put when
            they are there; None: all stay.
        late: what those that stay do not need comes after what they do.
        loops: for `Total.loops`.
        beside: bytes that pass in the time of one operation of a product.
    """
    there = _needed(kernels, outs)
    if late and carried:
        there = list(dict.fromkeys([*_needed(kernels, outs[:carried]), *there]))
    last: dict[Buffer, float] = {}
    for i, k in enumerate(there):
        last |= dict.fromkeys((*k.reads, *k.writes), i)
    last |= dict.fromkeys(outs[:carried], math.inf)
    live = moved = peak = gathered = 0
    for i, k in enumerate(there):
        done = {b for b in (*k.reads, *k.writes) if last[b] == i and not b.held}
        new = sum(b.size for b in k.writes)
        sent = sum(b.size for b in k.writes if b.moved)
        here = live + new + k.inner
        if k.fused and any(b.size >= new for b in done if b in k.reads):
            here -= new  # in the place of what it reads
        if here > peak:
            peak, gathered = here, moved + sent + k.gathered
        live += new - sum(b.size for b in done)
        moved += sent - sum(b.size for b in done if b.moved)
    return Total(
        flops=sum(k.flops for k in there),
        traffic=sum(_traffic(k) for k in there),
        peak=peak,
        gathered=gathered,
        waited=sum(_waited(k, beside) for k in there),
        loops=tuple(loops),
    )


def _needed(kernels: Sequence[Kernel], outs: Sequence[Buffer]) -> list[Kernel]:
    """Returns the kernels without which these arrays would not be there."""
    wanted, found = set(outs), []
    for k in reversed(kernels):
        made = k.writes if k.into is None else (*k.writes, k.into)
        if not wanted.isdisjoint(made):
            wanted |= k.reads.keys()
            found.append(k)
    return found[::-1]


def _traffic(k: Kernel) -> float:
    if k.traffic is not None:
        return k.traffic
    return sum(k.reads.values()) + sum(b.size for b in k.writes)


def _waited(k: Kernel, beside: float) -> float:
    return max(0.0, _traffic(k) - k.flops * beside) if k.waited is None else k.waited
