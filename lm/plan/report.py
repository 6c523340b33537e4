"""What a plan says: numbers with their units, for the terminal, plan.json and the page.

All bytes, operations and seconds are those of one device in one optimizer step, unless a field says
otherwise.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from lm.models.timetable import IDLE, Timetable
from lm.plan.chips import Chip

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest device at the fullest moment of a step."""

    parameters: int
    optimizer: int  # its state, and averages of the parameters
    gradients: int
    activations: dict[str, int]  # kept from forward to backward, by what they are of
    layer: int  # of the layer that is computed, or computed again
    loss: int  # of the chunk of tokens whose logits exist
    collectives: int  # what is gathered or sent, beside what it is made of
    margin: int  # code, and what allocators lose between blocks

    @property
    def total(self) -> int:
        """All of it."""
        single = dataclasses.asdict(self)
        kept = single.pop("activations")
        return sum(single.values()) + sum(kept.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed."""

    forward_flops: (
        float  # operations of one token forward, each query sees its keys only
    )
    forward_flops_full: float  # the same with every key of the row counted
    model_flops: (
        float  # forward and backward of the step's tokens, on one device, causal
    )
    model_flops_full: float
    hardware_flops: (
        float  # with what is computed again, and what a pipeline does in vain
    )
    hbm_bytes: float  # read and written
    waited_bytes: float  # of these, what does not pass beside arithmetic
    starts: float  # kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """What is sent for one reason over some mesh axes."""

    what: str  # "weights: layers", …
    kind: str  # all-gather, …
    axes: tuple[str, ...]
    link: str  # "nvlink", "ici", "dcn": the slowest on the way
    bytes: float  # received
    seconds: float
    hidden: float  # seconds of it that can pass beside computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Time:
    """Where the seconds of a step go."""

    compute: float  # hardware_flops at the rate that big products reach
    hbm: float  # seconds in which memory, not arithmetic, is waited for
    starts: float  # seconds that kernels take to start
    exposed: float  # seconds of transfers that nothing hides
    bubble: float  # seconds that the stages of a pipeline wait
    host: float  # seconds in which the input is waited for
    low: float  # predicted step, at best
    high: float  # and at worst
    limit: str  # what limits the step, in words: "compute", "ici (tensor)", …

    @property
    def step(self) -> float:
        """Seconds of a step, the sum of the parts."""
        on_device = self.compute + self.hbm + self.starts
        return on_device + self.exposed + self.bubble + self.host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What these seconds amount to."""

    tokens_per_second: float  # of all devices
    mfu: float  # model_flops at the chips' peak ÷ step, queries see their keys only
    mfu_full: float  # every key counted, as most published figures do
    days: float  # of the planned steps
    kwh: float | None  # of all chips at full load; None: power not published
    price: float | None  # of the planned steps, where a price was given; no currency


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """What hosts need."""

    ram: int  # bytes on each host: arrays on their way to disk, input
    ram_there: int
    data_rate: float  # bytes of tokens a second that each host reads
    checkpoint: int  # bytes of one, all hosts together
    checkpoint_seconds: float  # to write it, at `disk_rate` a host
    disk_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """A change, and what it is predicted to do."""

    change: tuple[str, ...]  # arguments of --set
    memory: int  # bytes on a device with it
    step: float  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the target's own compiler says."""

    seconds: float  # it took
    arguments: int  # bytes of state and batch on a device
    temporaries: int
    output: int  # bytes that are not in the place of arguments
    sent: dict[
        str, float
    ]  # bytes received by "all-gather over fsdp", …; loops unrolled
    refusal: str  # "" or why it does not fit, in one line

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return self.arguments + self.temporaries + self.output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change that a search came upon, and what it is predicted to do."""

    change: tuple[str, ...]  # arguments of --set
    memory: int  # bytes on a device
    step: float  # seconds
    tokens_per_second: float  # of all devices
    mfu: float
    limit: str  # what limits the step
    confirmed: bool  # the target's compiler says that it fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tick:
    """What a stage of a pipeline does in a tick of its timetable, one entry for each kind."""

    stage: int
    tick: int
    kind: str  # F forward, H head, B backward
    microbatch: int
    round: int = 0  # of the chunks of layers on a stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """What joins the devices along a mesh axis."""

    link: str  # "nvlink", "ici", "dcn", …
    rate: float  # bytes a second that a device receives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it. What a depth does not compute is None."""

    experiment: str
    about: str
    target: str
    depth: str  # types, model or compile
    chip: Chip
    devices: int
    hosts: int
    mesh: dict[str, int]  # devices along each mesh axis, slowest links first
    ways: dict[str, Way]  # of each mesh axis, `Target.ways`
    slices: int = 1
    changes: tuple[str, ...]  # --set as given
    parameters: dict[str, int]  # by kind: embedding, attention, feed-forward, …
    active: int  # parameters that a token meets
    tokens_per_step: int
    steps: int
    optimal_tokens: float  # for the active parameters (Hoffmann et al. 2022): 20 each
    memory: Memory
    work: Work | None = None
    transfers: tuple[Transfer, ...] = ()
    time: Time | None = None
    speed: Speed | None = None
    host: Host | None = None
    timetable: tuple[Tick, ...] = ()
    idle: float = 0.0  # share of a step in which a stage waits, `Timetable.bubble`
    compiled: Compiled | None = None
    advice: tuple[Advice, ...] = ()
    found: tuple[Candidate, ...] = ()  # by a search
    notes: tuple[str, ...] = ()  # lines to read

    @property
    def needs(self) -> int:
        """Bytes on a device, as far as the depth knows; the compiler's count goes first."""
        return self.memory.total if self.compiled is None else self.compiled.total

    @property
    def fits(self) -> bool:
        """Whether a device holds them, and the compiler does not refuse."""
        refused = self.compiled is not None and self.compiled.refusal
        return not refused and self.needs <= self.chip.hbm


# What a key of plan.json ends in, where the field's name does not say its unit.
UNITS: dict[type, dict[str, str]] = {
    Chip: {
        **dict.fromkeys(("bf16", "fp8"), "flops_per_second"),
        "int8": "operations_per_second",
        **dict.fromkeys(("hbm", "reserved", "host_ram"), "bytes"),
        **dict.fromkeys(("bandwidth", "links", "network"), "bytes_per_second"),
        "largest": "chips",
        "start": "seconds",
    },
    Memory: dict.fromkeys((*Memory.__dataclass_fields__, "total"), "bytes"),
    Transfer: {"hidden": "seconds"},
    Time: dict.fromkeys(
        (
            *("compute", "hbm", "starts", "exposed", "bubble", "host"),
            *("low", "high", "step"),
        ),
        "seconds",
    ),
    Host: {
        **dict.fromkeys(("ram", "ram_there", "checkpoint"), "bytes"),
        **dict.fromkeys(("data_rate", "disk_rate"), "bytes_per_second"),
    },
    Advice: {"memory": "bytes", "step": "seconds"},
    Candidate: {"memory": "bytes", "step": "seconds"},
    Compiled: dict.fromkeys(
        ("arguments", "temporaries", "output", "sent", "total"), "bytes"
    ),
    Way: {"rate": "bytes_per_second"},
    Plan: {"needs": "bytes"},
}


def to_json(value: Any) -> Any:
    """Returns what `json.dumps` takes of a plan or a part of one: units in the keys, sums too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        sums = [n for n, v in vars(type(value)).items() if isinstance(v, property)]
        return {
            _key(type(value), n): to_json(getattr(value, n)) for n in (*names, *sums)
        }
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(cls: type[T], data: dict[str, Any]) -> T:
    """Returns the plan, or part of one, that `to_json` wrote."""
    hints = typing.get_type_hints(cls)
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    return cls(
        **{f.name: _read(hints[f.name], data[_key(cls, f.name)]) for f in fields}
    )


def _key(cls: type, name: str) -> str:
    unit = UNITS.get(cls, {}).get(name)
    return f"{name}_{unit}" if unit else name


def _read(hint: Any, data: Any) -> Any:
    """A value of a field's type: a class, X | None, dict[str, X], tuple[X, ...]."""
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if data is None else _read(inner[0], data)
    if isinstance(data, list):
        return tuple(_read(inner[0], item) for item in data)
    if isinstance(data, dict):
        if dataclasses.is_dataclass(hint):
            return from_json(typing.cast(type, hint), data)
        return {key: _read(inner[1], item) for key, item in data.items()}
    return data


def ticks(table: Timetable) -> tuple[Tick, ...]:
    """Returns a timetable's entries in order; the head is work for every stage at once."""
    return tuple(_ticks(table))


def _ticks(table: Timetable) -> Iterator[Tick]:
    phases = [p for loop in table.loops for p in loop.phases * loop.times]
    kinds = [p.kinds for p in phases for _ in range(p.ticks)]
    for tick, does in enumerate(kinds):
        ends = table.forward[tick, -1]  # the job whose output the head takes
        for stage in range(table.stages):
            heads = ends if "H" in does else IDLE
            jobs = (table.forward[tick, stage], heads, table.backward[tick, stage])
            for kind, job in zip("FHB", map(int, jobs), strict=True):
                if job != IDLE:
                    m, r = divmod(job, table.rounds)
                    yield Tick(stage=stage, tick=tick, kind=kind, microbatch=m, round=r)
