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
    starts: float = 0.0  # kernels, of loops each turn's
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
    product: bool = False
    starts: float = 1.0  # kernels that it is made of
    into: Buffer | None = None  # changed in its place


def total(
    kernels: Sequence[Kernel],
    outs: Sequence[Buffer],
    carried: int | None = None,
    late: bool = False,
    loops: Sequence[Total] = (),
    beside: float = 0.0,
    through: bool = False,
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
        through: products do the elementwise work on what they read and on what they make.
    """
    if through:
        kernels = _joined(kernels, outs)
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
        starts=sum(k.starts for k in there),
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


def _joined(kernels: Sequence[Kernel], outs: Sequence[Buffer]) -> list[Kernel]:
    """Returns the kernels with elementwise work done in products, as XLA for TPUs does it.

    What one product alone reads is formed as it reads it; and what only elementwise work reads of
    a product is never stored, if all else that this reads is there before.
    """
    there = [dataclasses.replace(k) for k in _needed(kernels, outs)]
    place = {b: i for i, k in enumerate(there) for b in k.writes}
    readers: dict[Buffer, list[Kernel]] = {b: [] for b in (*place, *outs)}
    for k in there:
        for b in k.reads:
            readers.setdefault(b, []).append(k)
    final, gone = set(outs), set[Kernel]()

    def own(k: Kernel) -> bool:  # nothing but its readers needs what it makes
        return k.into is None and final.isdisjoint(k.writes)

    for k in there:
        users = {r for b in k.writes for r in readers[b]}
        if k.fused and own(k) and len(users) == 1 and (r := users.pop()).product:
            kept = {b: n for b, n in r.reads.items() if b not in k.writes}
            r.reads = _most(kept, k.reads)
            gone.add(k)
            for b in k.reads:
                readers[b] = [x for x in readers[b] if x is not k] + [r]
    for i, k in enumerate(there):
        users = list(dict.fromkeys(x for b in k.writes for x in readers[b]))
        others = {b for r in users for b in r.reads} - set(k.writes)
        ready = all(place.get(b, -1) < i for b in others)
        if k.product and own(k) and users and ready and all(r.fused for r in users):
            kept = [{b: r.reads[b] for b in others & r.reads.keys()} for r in users]
            k.reads = _most(k.reads, *kept)
            k.writes = tuple(b for r in users for b in r.writes)
            gone.update(users)
    return [k for k in there if k not in gone]


def _most(*reads: Mapping[Buffer, int]) -> dict[Buffer, int]:
    """Returns how much is read of each array by who reads most."""
    found: dict[Buffer, int] = {}
    for one in reads:
        for b, n in one.items():
            found[b] = max(n, found.get(b, 0))
    return found


def _traffic(k: Kernel) -> float:
    if k.traffic is not None:
        return k.traffic
    return sum(k.reads.values()) + sum(b.size for b in k.writes)


def _waited(k: Kernel, beside: float) -> float:
    return max(0.0, _traffic(k) - k.flops * beside) if k.waited is None else k.waited
