"""Which mesh, remat and pipeline are fastest on a target, by the model; and what to change.

A candidate is an experiment with other values in some fields. Those that the experiment itself
refuses, or that do not fit into memory, are left out.
"""

import dataclasses
import itertools
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

GIB = 2**30
REMATS = tuple(r for r in typing.get_args(stack.Remat) if r != "offload")


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate and what the model says of it."""

    sets: tuple[str, ...]
    bytes: int  # on a device
    step: float  # seconds
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
        held = memory.memory(prog, rough)
        computed = speed.work(prog, rough)
        sent, _ = speed.refused(prog, wanted)
    except ConfigError:
        return None
    rate = wanted.chip.bf16 * wanted.chip.reach
    sent = speed.hidden(sent, computed.hardware_flops / rate)
    spent = speed.times(prog, wanted.chip, computed, sent, wanted.hosts)
    mfu = computed.model_flops / wanted.chip.bf16 / spent.step
    return Found(tuple(sets), held.total, spent.step, mfu, spent.limit)


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

    Changes of one thing; where none of them makes it fit, of two.
    """
    assert plan.time is not None, "advice needs the model's depth"
    layout = wanted.layout(experiment.mesh)
    ones = list(neighbours(experiment, layout))
    now = Found((), plan.memory.total, plan.time.step, 0.0, plan.time.limit)
    found = _tried(experiment, ones, wanted)
    if not now.fits(wanted) and not any(f.fits(wanted) for f in found):
        pairs = [a + b for a, b in itertools.combinations(ones, 2) if _apart(a, b)]
        found += _tried(experiment, pairs, wanted)
    good = [f for f in found if f.fits(wanted)]
    if now.fits(wanted):
        good = [f for f in good if f.step < 0.97 * now.step]
    good = sorted(good, key=lambda f: f.step)[:most]
    return tuple(
        Advice(
            change=f.sets, memory=f.bytes, step=f.step, effect=_effect(f, now, wanted)
        )
        for f in good
    )


def _tried(
    experiment: Experiment, changes: Iterable[list[str]], wanted: Target
) -> list[Found]:
    found = (tried(experiment, sets, wanted) for sets in changes)
    return [f for f in found if f is not None]


def _apart(a: Sequence[str], b: Sequence[str]) -> bool:
    names = [s.split("=")[0] for s in (*a, *b)]
    return len(set(names)) == len(names)


def _effect(f: Found, now: Found, wanted: Target) -> str:
    held = f"{now.bytes / GIB:.1f} → {f.bytes / GIB:.1f} GiB of {wanted.chip.hbm / GIB:.0f}"
    change = f.step / now.step - 1
    words = "as fast" if abs(change) < 0.005 else f"a step takes {change:+.0%}"
    return f"{held}, {words}"


def candidates(experiment: Experiment, wanted: Target) -> Iterator[tuple[str, ...]]:
    """Yields the changes of every candidate: meshes x remat x accumulation x pipelines."""
    e = experiment
    for mesh in meshes(e, wanted):
        base = [f"mesh.{a}={n}" for a, n in mesh.items()]
        tensor = mesh["tensor"] > 1
        batch = mesh["data"] * mesh["fsdp"] * mesh["expert"]
        for parallel in (False, True) if tensor else (False,):
            sets = [*base, f"mesh.sequence_parallel={str(parallel).lower()}"]
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
                    for fsdp in _divisors(rest, rest):
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
    """Returns the candidates that fit, fastest first, and how many were looked at."""
    found: list[Found] = []
    count = 0
    for sets in candidates(experiment, wanted):
        count += 1
        one = tried(experiment, sets, wanted)
        if one is not None and one.fits(wanted):
            found.append(one)
        if count % 50 == 0:
            say(count, min((f.step for f in found), default=None))
    return sorted(found, key=lambda f: f.step), count


def ranked(found: Sequence[Found], experiment: Experiment) -> list[Candidate]:
    """Returns rows for the table, without what is as it is in the experiment."""
    tokens = experiment.train.batch_size * experiment.data.length
    here = {k: str(v) for k, v in config.flatten(experiment).items()}
    return [
        Candidate(
            change=tuple(
                s for s in f.sets if here.get(s.split("=")[0]) != s.split("=")[1]
            ),
            memory=f.bytes,
            step=f.step,
            tokens_per_second=tokens / f.step,
            mfu=f.mfu,
            limit=f.limit,
            confirmed=False,
        )
        for f in found
    ]
