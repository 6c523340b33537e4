"""How long a step takes on a target, and what for: arithmetic, memory, links, bubbles, input.

A model of one device: products run at the rate that large ones reach; what is not a product waits
for memory; transfers run at the rate of the slowest link on their way, and those that the next
layer's arithmetic does not need (gathers and reductions of ZeRO-3, ring hops) pass beside it.
"""

import dataclasses
import math
from collections.abc import Sequence

from lm import batches, sharding
from lm.plan import count, layer, minimum
from lm.plan.chips import Chip
from lm.plan.report import Host, Memory, Speed, Time, Transfer, Work
from lm.plan.target import Target
from lm.plan.work import work
from lm.program import Program

# What transfers reach of a link: assumed, not measured here.
REACH = {"ici": 0.9, "nvlink": 0.8, "dcn": 0.8, "network": 0.8, "memory": 1.0}
WAIT = 1e-5  # seconds until a few bytes of other devices are there: assumed, too
# What the arithmetic of other layers or ticks can pass beside: weights ahead of their use,
# gradients behind it, keys of the next hop.
BESIDE = ("weights: layers", "gradients: layers", "keys", "keys: gradients", "stages")
# Of the usual rate of products, in the upper end of the range: so low that the slowest of the
# published runs lies in it (tests/published_test.py).
WORST = 0.75
DISK = 1e9  # bytes a second that a host writes a checkpoint at, as network disks do
FEED = 5e6  # tokens a second that a host's loader gives
PROGRAM_RAM = 4 * 2**30  # of a host: Python, XLA and the input


def transfers(prog: Program, wanted: Target) -> list[Transfer]:
    """Returns what a device receives in a step, and how long it takes alone."""
    ways = wanted.ways(dict(prog.layout.mesh.shape))
    found = []
    for term in minimum.of(prog):
        rate, link = min((ways[a] for a in term.axes), default=(math.inf, ""))
        axes = tuple(a for a in sharding.AXES if a in term.axes)
        seconds = term.bytes / (rate * REACH[link]) + term.waits * WAIT
        found.append(
            Transfer(
                what=term.what,
                kind=term.kind,
                axes=axes,
                link=link,
                bytes=term.bytes,
                seconds=seconds,
                hidden=seconds if term.what in BESIDE else 0.0,
            )
        )
    return found


def hidden(found: Sequence[Transfer], compute: float) -> list[Transfer]:
    """Returns the transfers with the seconds that so much arithmetic can hide: links of one kind
    share it, and what is longer stays in sight."""
    longest: dict[str, float] = {}
    for t in found:
        longest[t.link] = longest.get(t.link, 0.0) + t.hidden
    share = {link: min(1.0, compute / s) if s else 0.0 for link, s in longest.items()}
    return [
        dataclasses.replace(t, hidden=t.hidden * share[t.link]) if t.hidden else t
        for t in found
    ]


def times(
    prog: Program, chip: Chip, computed: Work, sent: Sequence[Transfer], hosts: int
) -> Time:
    """Returns where the seconds of a step go."""
    useful = _useful(prog)
    products = computed.hardware_flops / (chip.bf16 * chip.reach)
    memory = computed.waited_bytes / chip.bandwidth
    starts = computed.starts * chip.start
    busy = products + memory + starts
    alone = sum(t.seconds for t in sent)
    exposed = alone - sum(t.hidden for t in sent)
    tokens = tokens_of(prog)
    host = max(0.0, tokens / hosts / FEED - busy - exposed)
    parts = {
        "compute": products * useful,
        "HBM": memory * useful,
        "starting kernels": starts * useful,
        "bubble": busy * (1 - useful),
        "host input": host,
    }
    for t in sent:
        name = f"{t.link} ({' x '.join(t.axes)})"
        parts[name] = parts.get(name, 0.0) + t.seconds - t.hidden
    return Time(
        compute=parts["compute"],
        hbm=parts["HBM"],
        starts=parts["starting kernels"],
        exposed=exposed,
        bubble=parts["bubble"],
        host=host,
        low=busy + host + max(0.0, alone - busy),
        high=products / WORST + memory + starts + alone + host,
        limit=max(parts, key=lambda name: parts[name]),
    )


def _useful(prog: Program) -> float:
    """Share of a pipeline's ticks in which a stage has work; 1 without stages."""
    if not prog.staged:
        return 1.0
    runs, A = count.passes(prog), prog.experiment.train.accumulate
    jobs = A * prog.microbatches * prog.experiment.pipeline.rounds
    return 3 * jobs / (runs.forward + 2 * runs.backward)


def tokens_of(prog: Program) -> int:
    """Returns the tokens of a step in which something is predicted."""
    e = prog.experiment
    return e.train.batch_size * batches.written(e.objective, e.data)


def speed(
    prog: Program, wanted: Target, computed: Work, spent: Time, price: float | None
) -> Speed:
    """Returns what the seconds of a step amount to; `price` of a chip for an hour."""
    e, chip = prog.experiment, wanted.chip
    step = spent.step
    total = step * e.train.steps
    hours = wanted.devices * total / 3600
    return Speed(
        tokens_per_second=tokens_of(prog) / step,
        mfu=computed.model_flops / chip.bf16 / step,
        mfu_full=computed.model_flops_full / chip.bf16 / step,
        days=total / 86400,
        kwh=None if chip.watts is None else hours * chip.watts / 1000,
        price=None if price is None else hours * price,
    )


def host(prog: Program, wanted: Target, memory: Memory, rate: float) -> Host:
    """Returns what hosts need; `rate` is in tokens a second of all of them."""
    chips_here = wanted.devices // wanted.hosts
    state = memory.parameters + memory.optimizer
    size = state * wanted.devices // _copies(prog)
    item = 2 if prog.experiment.model.vocab_size <= 2**16 else 4
    return Host(
        ram=state * chips_here + PROGRAM_RAM,
        ram_there=wanted.chip.host_ram,
        data_rate=rate / wanted.hosts * item,
        checkpoint=size,
        checkpoint_seconds=size / wanted.hosts / DISK,
        disk_rate=DISK,
    )


def _copies(prog: Program) -> int:
    """How many devices hold the same parameters, by those that most entries are held by."""
    shards: dict[int, int] = {}
    for path, spec in prog.specs.items():
        axes = [a for entry in spec for a in sharding.names(entry)]
        n = math.prod(prog.layout.mesh.shape[a] for a in axes)
        shards[n] = shards.get(n, 0) + math.prod(prog.shapes[path].shape)
    most = max(shards, key=lambda n: shards[n])
    return prog.layout.mesh.size // most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a step does and how long it takes."""

    work: Work
    transfers: list[Transfer]
    time: Time


def predict(
    prog: Program, wanted: Target, parts: layer.Costs | None = None
) -> Prediction:
    """Returns what the model says of a step; `parts` as of `work`."""
    chip, computed = wanted.chip, work(prog, parts)
    sent = transfers(prog, wanted)
    sent = hidden(sent, computed.hardware_flops / (chip.bf16 * chip.reach))
    spent = times(prog, chip, computed, sent, wanted.hosts)
    return Prediction(work=computed, transfers=sent, time=spent)
