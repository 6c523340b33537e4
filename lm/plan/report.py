"""What a plan says: numbers with their units, for the terminal, plan.json and the page.

All bytes, operations and seconds are those of one device in one optimizer step, unless a field says
otherwise.
"""

import dataclasses

from lm.plan.chips import Chip


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
    margin: int  # what allocators lose between blocks

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
    exposed: float  # seconds of transfers that nothing hides
    bubble: float  # seconds that the stages of a pipeline wait
    host: float  # seconds in which the input is waited for
    low: float  # predicted step, at best
    high: float  # and at worst
    limit: str  # what limits the step, in words: "compute", "ici (tensor)", …

    @property
    def step(self) -> float:
        """Seconds of a step, the sum of the parts."""
        return self.compute + self.hbm + self.exposed + self.bubble + self.host


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
    effect: str  # in words


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
class Tick:
    """What a stage of a pipeline does in a tick of its timetable."""

    stage: int
    tick: int
    kind: str  # F forward, B backward, H head; of one tick perhaps several
    microbatch: int


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
    mesh: dict[str, int]  # devices along each mesh axis
    changes: tuple[str, ...]  # --set as given
    parameters: dict[str, int]  # by kind: embedding, attention, feed-forward, …
    active: int  # parameters that a token meets
    tokens_per_step: int
    steps: int
    optimal_tokens: float  # for this many parameters (Hoffmann et al. 2022): 20 each
    memory: Memory
    work: Work | None = None
    transfers: tuple[Transfer, ...] = ()
    time: Time | None = None
    speed: Speed | None = None
    host: Host | None = None
    timetable: tuple[Tick, ...] = ()
    idle: float = 0.0  # share of ticks in which a stage waits
    compiled: Compiled | None = None
    advice: tuple[Advice, ...] = ()
    notes: tuple[str, ...] = ()  # lines to read

    @property
    def fits(self) -> bool:
        """Whether a device holds it, by the compiler's count where there is one."""
        if self.compiled is not None:
            return not self.compiled.refusal and self.compiled.total <= self.chip.hbm
        return self.memory.total <= self.chip.hbm
