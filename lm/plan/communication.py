"""A train step compiled for devices that need not be here: what it sends, and what it must."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lm import sharding, train
from lm.plan import collectives, minimum
from lm.program import Program


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes that a device receives in a step, of one kind over the same mesh axes."""

    kind: str
    axes: frozenset[str]
    needed: float
    sent: float

    @property
    def where(self) -> str:
        """The mesh axes as text."""
        return " x ".join(a for a in sharding.AXES if a in self.axes)


def compiled(prog: Program) -> Any:
    """Returns the compiled train step of `prog`; no array exists."""
    step: Any = train.make_train_step(prog)
    return step.lower(train.abstract_state(prog), train.abstract_batch(prog)).compile()


def compare(prog: Program, found: Sequence[collectives.Collective]) -> list[Row]:
    """Returns what is sent beside what must be, the most first."""
    sent, needed = collectives.totals(found), minimum.totals(minimum.of(prog))
    rows = [
        Row(kind, axes, needed.get((kind, axes), 0.0), sent.get((kind, axes), 0.0))
        for kind, axes in {*sent, *needed}
    ]
    return sorted(rows, key=lambda r: (-max(r.sent, r.needed), r.kind, r.where))


def ratio(rows: Sequence[Row]) -> float:
    """Returns bytes sent over bytes needed, of all rows together."""
    return sum(r.sent for r in rows) / sum(r.needed for r in rows)


def table(rows: Sequence[Row], title: str, least: float = 0.005) -> str:
    """Returns Markdown rows: kinds over axes, of at least a share `least` of all, and the sum."""
    total = sum(r.sent for r in rows)
    lines = []
    for r in rows:
        if max(r.sent, r.needed) < least * total:
            continue
        share = f"{r.sent / r.needed:.3f}" if r.needed else "—"
        lines.append(
            f"| {title} | {r.kind} over {r.where} | {r.needed / 1e6:.1f} | "
            f"{r.sent / 1e6:.1f} | {share} |"
        )
    needed = sum(r.needed for r in rows)
    lines.append(
        f"| **{title}** | all | {needed / 1e6:.1f} | {total / 1e6:.1f} | "
        f"**{ratio(rows):.3f}** |"
    )
    return "\n".join(lines)
