"""Which mesh, remat and pipeline are fastest on a target, by the model; and what to change.

A candidate is an experiment with other values in some fields. Those that the experiment itself
refuses, or that do not fit into memory, are left out.
"""

import dataclasses
import itertools
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm import config, sharding, train
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.models import stack
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.moe import Moe
from lm.plan import memory, speed
from lm.plan.report import Advice, Candidate, Plan
from lm.plan.target import Target
from lm.program import Program

KEPT = 12  # of the best candidates are looked at exactly
REMATS = tuple(r for r in typing.get_args(stack.Remat) if r != "offload")


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

    `rough` is milliseconds where layers like these were looked at before, see `layer.costs`.
    """
    try:
        changed = config.override(experiment, list(sets))
        prog = train.program(changed, wanted.layout(changed.mesh))
        if rough and _state(prog) > wanted.chip.hbm:
            return None  # nothing else needs to be looked at
        held = memory.memory(prog, rough)
        found = speed.predict(prog, wanted, rough)
    except ConfigError:
        return None
    return Found(
        sets=tuple(sets),
        bytes=held.total,
        step=found.time.step,
        tokens=speed.tokens_of(prog),
        mfu=found.work.model_flops / wanted.chip.bf16 / found.time.step,
        limit=found.time.limit,
    )


def _state(prog: Program) -> int:
    """Bytes of parameters and optimizer on a device."""
    there = memory.state(prog, rough=True)
    return there.parameters + there.optimizer


def neighbours(experiment: Experiment, layout: sharding.Layout) -> Iterator[list[str]]:
    """Yields changes of one thing: remat, accumulation, one mesh axis against another, …"""
    e, mesh = experiment, dict(layout.mesh.shape)
    for remat in REMATS:
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


def candidates(experiment: Experiment, wanted: Target) -> Iterator[tuple[str, ...]]:
    """Yields the changes of every candidate: meshes x remat x accumulation x pipelines."""
    e = experiment
    for mesh in meshes(e, wanted):
        base = [f"mesh.{a}={n}" for a, n in mesh.items()]
        tensor = mesh["tensor"] > 1
        batch = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        sets = [*base, f"mesh.sequence_parallel={str(tensor).lower()}"]
        for A, M, schedule in _flows(e, mesh["pipe"], batch):
            flow = [f"train.accumulate={A}", *schedule]
            if M:
                flow.append(f"pipeline.microbatches={M}")
            for remat in REMATS:
                yield (*sets, *flow, f"model.remat={remat}")


def _flows(
    e: Experiment, stages: int, batch: int
) -> Iterator[tuple[int, int, list[str]]]:
    """Accumulation, microbatches and schedule that the batch divides by."""
    rows = e.train.batch_size // batch
    powers = [2**k for k in range(12)]
    if stages == 1:
        for A in powers:
            if rows % A == 0 and rows >= A:
                yield A, 0, ["pipeline.schedule=1f1b", "pipeline.rounds=1"]
        return
    for k in powers:
        M = k * stages
        if rows < M or rows % M:
            continue
        yield 1, M, ["pipeline.schedule=1f1b", "pipeline.rounds=1"]
        for rounds in (2, 4):
            if e.model.layers >= stages * rounds:
                yield (
                    1,
                    M,
                    ["pipeline.schedule=interleaved", f"pipeline.rounds={rounds}"],
                )


def meshes(e: Experiment, wanted: Target) -> Iterator[dict[str, int]]:
    """Yields the meshes that the model and the batch allow, every size a divisor of the devices.

    Tensor stays within the near links, and pipelines come where there are layers enough.
    """
    n, model = wanted.devices, e.model
    plain = isinstance(model, Transformer.Config)
    heads = model.heads if plain else 1
    experts = model.ffn.experts if isinstance(model.ffn, Moe.Config) else 1
    near = wanted.shape[-1] if wanted.chip.platform == "gpu" else 16
    for tensor in _divisors(n, min(near, heads)):
        for pipe in _divisors(n // tensor, model.layers if plain else 1):
            left = n // tensor // pipe
            for expert in _divisors(left, experts):
                seqs = 1 if isinstance(model, Recurrent.Config) else e.data.length
                for seq in _divisors(left // expert, min(seqs // 4096, 64)):
                    rest = left // expert // seq
                    for fsdp in sorted(
                        {1, rest, math.gcd(rest, max(near // tensor, 1))}
                    ):
                        data = rest // fsdp
                        if e.train.batch_size % (data * fsdp * expert):
                            continue
                        sizes = (pipe, data, fsdp, seq, expert, tensor)
                        yield dict(zip(sharding.AXES, sizes, strict=True))


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0]


def search(
    experiment: Experiment, wanted: Target, say: Any = lambda done, best: None
) -> tuple[list[Found], int]:
    """Returns the fastest candidates that fit, and how many were looked at; `say` hears of both."""
    found: list[Found] = []
    count = 0
    for sets in candidates(experiment, wanted):
        count += 1
        one = tried(experiment, sets, wanted, rough=True)
        if one is not None and one.fits(wanted):
            found.append(one)
        if count % 500 == 0:
            say(count, min((f.step for f in found), default=None))
    return exactly(experiment, found, wanted, KEPT), count


def ranked(found: Sequence[Found], experiment: Experiment) -> list[Candidate]:
    """Returns rows for the table, without what is as it is in the experiment."""
    here = {f"{k}={v}".lower() for k, v in config.flatten(experiment).items()}
    return [
        Candidate(
            change=tuple(s for s in f.sets if s not in here),
            memory=f.bytes,
            step=f.step,
            tokens_per_second=f.tokens / f.step,
            mfu=f.mfu,
            limit=f.limit,
            confirmed=False,
        )
        for f in found
    ]
