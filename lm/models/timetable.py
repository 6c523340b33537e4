"""Pipeline schedules as tables: which stage runs which microbatch at which tick. No device needed.

A stage holds `rounds` chunks of layers; chunk c of the model is round c // P on stage c % P. In a
tick every stage runs at most one forward and one backward of one chunk, and hands its result to a
neighbour: forward to the next stage (the last one to the first, for the next round), backward to
the one before.

Letters: P stages, M microbatches, v rounds, m microbatch, r round, s stage, t tick.

gpipe (Huang et al. 2019): forward of m on s at tick m + s; when all are done, backward.
1f1b (Narayanan et al. 2019): backward of m begins on the last stage in the tick of its forward.
interleaved (Narayanan et al. 2021): 1f1b over v P chunks, microbatches in groups of P: a stage
runs round 0 of a group, then round 1, …, so that the wrapped-round result arrives just in time.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from lm.config import ConfigError

IDLE = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How microbatches flow through the stages of `mesh.pipe`; unused where that is 1.

    A stage's backward computes its chunk again from the kept input, under every schedule; within
    that, `model.remat` says what is kept of the chunk's layers, and so what is computed a third
    time. `none` computes least, and holds the layers of one chunk and one microbatch.
    """

    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"  # of two stacks: gpipe
    microbatches: int | None = None  # of each accumulated part; None: 4 for each stage
    rounds: int = 1  # chunks of layers on a stage, for interleaved
    # When weights stored in shares (mesh.fsdp) are gathered: for every tick (ZeRO-3, least held),
    # or once a step and held whole with their gradients (the traffic of ZeRO-1, least sent).
    gather: Literal["tick", "step"] = "tick"

    def __post_init__(self) -> None:
        if self.microbatches is not None and self.microbatches < 1:
            raise ConfigError(
                f"pipeline.microbatches={self.microbatches}: expected 1 or more, or none"
            )
        if self.rounds < 1:
            raise ConfigError(f"pipeline.rounds={self.rounds}: expected 1 or more")
        if self.schedule == "interleaved" and self.rounds == 1:
            raise ConfigError(
                "pipeline.schedule=interleaved needs pipeline.rounds of 2 or more; with one round "
                "it is 1f1b"
            )
        if self.schedule != "interleaved" and self.rounds > 1:
            raise ConfigError(
                f"pipeline.rounds={self.rounds} is for pipeline.schedule=interleaved; "
                f"{self.schedule} has one round"
            )

    def count(self, stages: int) -> int:
        """Returns the number of microbatches on so many stages.

        Raises:
            ConfigError: interleaved, and they do not come in groups of `stages`.
        """
        M = 4 * stages if self.microbatches is None else self.microbatches
        if self.rounds > 1 and M % stages:
            fits = sorted({max(M // stages, 1) * stages, -(-M // stages) * stages})
            raise ConfigError(
                f"pipeline.microbatches={M} is not a multiple of mesh.pipe={stages}, which "
                f"interleaved needs; use {' or '.join(map(str, fits))}"
            )
        return M


@dataclasses.dataclass(frozen=True)
class Phase:
    """Ticks of one kind in a row; the program runs them as one loop."""

    kinds: str  # of "F" forward, "H" head and loss, "B" backward
    ticks: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """Phases one after the other, so many times."""

    times: int
    phases: tuple[Phase, ...]

    @property
    def ticks(self) -> int:
        """Ticks of all times."""
        return self.times * sum(p.ticks for p in self.phases)


@dataclasses.dataclass(frozen=True, eq=False)
class Timetable:
    """Who does what when. A job is m * rounds + r; `IDLE` is none."""

    stages: int
    microbatches: int
    rounds: int
    forward: np.ndarray  # int [ticks, P]: job
    backward: np.ndarray  # int [ticks, P]: job
    slots: int  # chunk inputs that a stage keeps at most
    forward_slot: np.ndarray  # int [ticks, P]: where the input of that forward is kept
    backward_slot: (
        np.ndarray
    )  # int [ticks, P]: where the input of that backward was kept
    head_slots: int  # gradients of the last stage's outputs that wait at most
    loops: tuple[Loop, ...]

    @property
    def jobs(self) -> int:
        """Forwards of one stage; there are as many backwards."""
        return self.microbatches * self.rounds

    @property
    def bubble(self) -> float:
        """Share of the time that a stage waits, from this table: forwards count 1, backwards 2."""
        spent = sum(
            loop.times * phase.ticks * (("F" in phase.kinds) + 2 * ("B" in phase.kinds))
            for loop in self.loops
            for phase in loop.phases
        )
        per_job = 1 + 2 * bool((self.backward != IDLE).any())
        return 1 - self.jobs * per_job / spent

    def picture(self) -> str:
        """Returns the table as text: a line for each stage's forwards, one for its backwards."""
        width = len(self._name(self.jobs - 1)) + 1
        lines = []
        for s in range(self.stages):
            for what, table in (("F", self.forward), ("B", self.backward)):
                cells = "".join(
                    self._name(j).rjust(width) for j in table[:, s].tolist()
                )
                head = f"stage {s}" if what == "F" else ""
                lines.append(f"{head:8} {what} {cells}".rstrip())
        return "\n".join(lines) + "\n"

    def _name(self, job: int) -> str:
        if job == IDLE:
            return "."
        m, r = divmod(job, self.rounds)
        return str(m) if self.rounds == 1 else f"{m}{chr(ord('a') + r)}"


@functools.lru_cache(maxsize=256)
def make(schedule: str, stages: int, microbatches: int, rounds: int = 1) -> Timetable:
    """Returns the table of a schedule; `forward` alone (schedule "forward") is for evaluation."""
    P, M, v = stages, microbatches, rounds
    group, place = np.divmod(np.arange(M), P)  # of a microbatch
    turn = np.arange(v)
    # When round r of microbatch m starts on stage 0, and when its backward does on stage P - 1.
    if v == 1:
        start = np.arange(M)[:, None]
        back = start
    else:
        start = (group * P * v + place)[:, None] + turn * P
        back = (group * P * v + place)[:, None] + (v - 1 - turn) * P
    first = {
        "gpipe": v * M + P - 1,  # after all forwards
        "1f1b": v * P - 1,  # in the tick in which the last chunk first has an output
        "interleaved": v * P - 1,
        "forward": None,
    }[schedule]
    ticks = v * M + P - 1 + (0 if first is None else first)
    forward = np.full((ticks, P), IDLE)
    backward = np.full((ticks, P), IDLE)
    jobs = np.arange(M * v).reshape(M, v)
    for s in range(P):
        forward[start + s, s] = jobs
        if first is not None:
            backward[first + P - 1 - s + back, s] = jobs
    slots, forward_slot, backward_slot = _slots(forward, backward)
    return Timetable(
        stages=P,
        microbatches=M,
        rounds=v,
        forward=forward,
        backward=backward,
        slots=slots,
        forward_slot=forward_slot,
        backward_slot=backward_slot,
        head_slots=M if schedule == "gpipe" else 1,
        loops=tuple(_loops(schedule, P, M, v)),
    )


def _loops(schedule: str, P: int, M: int, v: int) -> Iterator[Loop]:
    """Ticks by what any stage does in them; no head runs where no chunk is the model's last."""

    def once(kinds: str, ticks: int) -> Iterator[Loop]:
        if ticks:
            yield Loop(1, (Phase(kinds, ticks),))

    if schedule in ("gpipe", "forward"):
        yield from once("F", v * P - 1)
        yield from once("FH", v * (M - P) + P)
        if schedule == "gpipe":
            yield from once("B", M + P - 1)
        return
    yield from once("F", v * P - 1)
    if v == 1:
        yield from once("FHB", M)
    else:
        yield from once("FHB", P)
        if M > P:
            yield Loop(M // P - 1, (Phase("FB", (v - 1) * P), Phase("FHB", P)))
    yield from once("B", v * P - 1)


def _slots(
    forward: np.ndarray, backward: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """Gives every kept input a slot from its forward to its backward, as few as there can be."""
    f_slot, b_slot = np.zeros_like(forward), np.zeros_like(backward)
    if (backward == IDLE).all():
        return 1, f_slot, b_slot
    most = 0
    for s in range(forward.shape[1]):
        free: list[int] = []
        used: dict[int, int] = {}
        count = 0
        for t in range(forward.shape[0]):
            if (job := forward[t, s]) != IDLE:
                if not free:
                    free, count = [count], count + 1
                used[job] = f_slot[t, s] = free.pop()
            if (job := backward[t, s]) != IDLE:
                free.append(used.pop(job))
                b_slot[t, s] = free[-1]
        most = max(most, count)
    return most, f_slot, b_slot


def placement(
    layers: int, stages: int, rounds: int = 1, name: str = "model.layers"
) -> np.ndarray:
    """Returns int [P, v, l]: the layer in each place, `IDLE` where there is none.

    Layers that the chunks do not divide leave places empty at the end of the last chunks.
    `name` is the setting of their number.

    Raises:
        ConfigError: fewer layers than chunks.
    """
    chunks = stages * rounds
    if layers < chunks > 1:  # one chunk may be of no layers
        raise ConfigError(
            f"{name}={layers} are fewer than the {chunks} chunks of mesh.pipe={stages} x "
            f"pipeline.rounds={rounds}; use fewer stages or rounds"
        )
    least, more = divmod(layers, chunks)
    places = np.full((rounds, stages, least + bool(more)), IDLE)
    first = 0
    for c in range(chunks):
        count = least + (c < more)
        places[c // stages, c % stages, :count] = first + np.arange(count)
        first += count
    return places.swapaxes(0, 1)
