"""What the model says of an experiment with other values in some fields, and which to change.

Changes that the experiment itself refuses, or that do not fit into memory, are left out.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from lm import config, sharding, train
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.plan import choices, layer, memory, scaled, speed
from lm.plan.report import Advice, Candidate, Plan
from lm.plan.target import Target
from lm.program import Program


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate and what the model says of it."""

    sets: tuple[str, ...]
    bytes: int  # on a device
    step: float  # seconds
    tokens: int  # of a step
    mfu: float
    limit: str

    def fits(self, wanted: Target) -> bool:
        """Whether a device has room for it."""
        return self.bytes <= wanted.chip.hbm


def tried(
    experiment: Experiment, sets: Sequence[str], wanted: Target, rough: bool = False
) -> Found | None:
    """Returns what the model says of the experiment with these changes, None if it is refused.

    `rough` is milliseconds where layers like these were looked at before, see `scaled.costs`.
    """
    try:
        changed = config.override(experiment, list(sets))
        prog = train.program(changed, wanted.layout(changed.mesh))
        return look(prog, wanted, scaled.costs(prog) if rough else None, sets)
    except ConfigError:
        return None


def look(
    prog: Program,
    wanted: Target,
    parts: layer.Costs | None = None,
    sets: Sequence[str] = (),
) -> Found:
    """Returns what the model says of a program, of which `parts` may be known."""
    held = memory.memory(prog, parts)
    found = speed.predict(prog, wanted, parts)
    return Found(
        sets=tuple(sets),
        bytes=held.total,
        step=found.time.step,
        tokens=speed.tokens_of(prog),
        mfu=found.work.model_flops / wanted.chip.bf16 / found.time.step,
        limit=found.time.limit,
    )


def neighbours(experiment: Experiment, layout: sharding.Layout) -> Iterator[list[str]]:
    """Yields changes of one thing: remat, accumulation, one mesh axis against another, …"""
    e, mesh = experiment, dict(layout.mesh.shape)
    for remat in choices.REMATS:
        if remat != e.model.remat:
            yield [f"model.remat={remat}"]
    A = e.train.accumulate
    for n in (2 * A, A // 2):
        if n:
            yield [f"train.accumulate={n}"]
    if mesh["pipe"] > 1:
        M = e.pipeline.count(mesh["pipe"])
        yield [f"pipeline.microbatches={2 * M}"]
        yield [f"pipeline.gather={'step' if e.pipeline.gather == 'tick' else 'tick'}"]
    if mesh["tensor"] > 1:
        yield [f"mesh.sequence_parallel={str(not e.mesh.sequence_parallel).lower()}"]
    if mesh["data"] > 1 and not e.mesh.zero1:
        yield ["mesh.zero1=true"]
    for a, b in itertools.permutations(sharding.AXES, 2):
        for n in (2, 4, 8):
            if mesh[a] % n == 0:
                yield [f"mesh.{a}={mesh[a] // n}", f"mesh.{b}={mesh[b] * n}"]


def advice(
    experiment: Experiment, plan: Plan, wanted: Target, most: int = 3
) -> tuple[Advice, ...]:
    """Returns the cheapest changes: those that make it fit, else those that make it faster.

    Changes of one thing; where none of them makes it fit, of two. Looked at roughly first.
    """
    assert plan.time is not None, "advice needs the model's depth"
    layout = wanted.layout(experiment.mesh)
    ones = list(neighbours(experiment, layout))
    fits, step = plan.memory.total <= wanted.chip.hbm, plan.time.step
    found = _tried(experiment, ones, wanted)
    if not fits and not any(f.fits(wanted) for f in found):
        pairs = [a + b for a, b in itertools.combinations(ones, 2) if _apart(a, b)]
        found += _tried(experiment, pairs, wanted)
    good = exactly(experiment, found, wanted, 2 * most)
    if fits:
        good = [f for f in good if f.step < 0.97 * step]
    good = good[:most]
    return tuple(Advice(change=f.sets, memory=f.bytes, step=f.step) for f in good)


def _tried(
    experiment: Experiment, changes: Iterable[list[str]], wanted: Target
) -> list[Found]:
    found = (tried(experiment, sets, wanted, rough=True) for sets in changes)
    return [f for f in found if f is not None]


def exactly(
    experiment: Experiment, found: Iterable[Found], wanted: Target, most: int
) -> list[Found]:
    """Returns the fastest of those that fit, each looked at again, exactly."""
    fits = sorted((f for f in found if f.fits(wanted)), key=lambda f: f.step)
    again = (tried(experiment, f.sets, wanted) for f in fits[:most])
    good = [f for f in again if f is not None and f.fits(wanted)]
    return sorted(good, key=lambda f: f.step)


def _apart(a: Sequence[str], b: Sequence[str]) -> bool:
    names = [s.split("=")[0] for s in (*a, *b)]
    return len(set(names)) == len(names)


def ranked(found: Sequence[Found]) -> list[Candidate]:
    """Returns rows for the table."""
    return [
        Candidate(
            change=f.sets,
            memory=f.bytes,
            step=f.step,
            tokens_per_second=f.tokens / f.step,
            mfu=f.mfu,
            limit=f.limit,
            confirmed=False,
        )
        for f in found
    ]
