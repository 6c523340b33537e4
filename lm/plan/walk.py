"""The walk through a search's candidates: first those that may be best, and few of them closely.

Each candidate is looked at up to three times. What it costs at the least (`scaled.least`) takes no
trace of its own; it says which cannot fit, and puts the others in order. In that order they are
looked at roughly (`scaled.costs`), until the next cannot be among the best; these then, exactly.
"""

import dataclasses
import heapq
import math
import time
from collections.abc import Callable
from typing import Any

from lm import train
from lm.config import ConfigError
from lm.experiment import Experiment
from lm.plan import choices, memory, scaled, speed
from lm.plan import search as looks
from lm.plan.choices import Choice
from lm.plan.search import Found
from lm.plan.target import Target
from lm.program import Program, varied

KEPT = 10  # of the best candidates are looked at exactly
EVERY = 5.0  # seconds from one word on the progress to the next
NEAR = 8  # candidates that do not fit, kept to tell the nearest

Say = Callable[[int, float | None], None]  # candidates so far, and the best step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found."""

    found: list[Found]  # that fit, looked at exactly, the fastest first
    count: int  # candidates
    closely: int  # of these looked at more than at the least
    nearest: Found | None  # that does not fit, if none does
    refusal: str  # of candidates that no mesh of theirs can run, the first


def search(
    experiment: Experiment, wanted: Target, say: Say = lambda n, s: None
) -> Result:
    """Returns the fastest candidates that fit; `say` hears how it goes on."""
    return _Walk(experiment, wanted, say).run()


@dataclasses.dataclass(order=True)
class _Node:
    """A candidate, or all of a flow whatever they compute again, by its least step."""

    step: float
    number: int  # so that no two are equal
    choice: Choice = dataclasses.field(compare=False)
    rest: list[Choice] | None = dataclasses.field(compare=False)  # None: a candidate


class _Walk:
    def __init__(self, experiment: Experiment, wanted: Target, say: Say):
        self.experiment, self.wanted, self.say = experiment, wanted, say
        self.count = self.closely = self.numbers = 0
        self.heap: list[_Node] = []
        self.good: list[tuple[float, int, Choice]] = []  # that fit, roughly, in order
        self.near: list[tuple[float, int, Choice]] = []  # -bytes of those that do not
        self.refusal = ""
        self.programs: dict[Any, Program] = {}
        self.said = time.monotonic()

    def run(self) -> Result:
        """Returns what `search` does."""
        for chain in choices.chains(self.experiment, self.wanted):
            self.begin(chain)
        exact: dict[int, Found] = {}
        while True:
            self.advance()
            best = self.good[:KEPT]
            for _, number, choice in best:
                if number not in exact:
                    exact[number] = self.exactly(choice)
            wrong = [g for g in best if not exact[g[1]].fits(self.wanted)]
            if not wrong:
                break
            self.good = [g for g in self.good if g not in wrong]
        found = sorted((exact[n] for _, n, _ in best), key=lambda f: f.step)
        nearest = None if found else self.nearest()
        return Result(found, self.count, self.closely, nearest, self.refusal)

    def begin(self, chain: list[Choice]) -> None:
        """Puts a mesh's flows in line, if their state fits."""
        self.count += len(chain) * len(choices.REMATS)
        self.tell()
        for i, choice in enumerate(chain):
            if (prog := self.program(choice)) is None:
                continue
            there = memory.state(prog, rough=True)
            if (size := there.parameters + there.optimizer) > self.wanted.chip.hbm:
                self.missed(size, dataclasses.replace(chain[-1], remat="full"))
                return
            # Without stages more microbatches are only slower; they wait for their turn.
            alone = choice.mesh.pipe == 1
            self.line_up(prog, choice, chain[i + 1 :] if alone else [])
            if alone:
                return

    def line_up(self, prog: Program, choice: Choice, rest: list[Choice]) -> None:
        parts = scaled.least(prog, choices.REMATS)
        step = speed.predict(prog, self.wanted, parts).time.step
        self.push(step, choice, rest)

    def push(self, step: float, choice: Choice, rest: list[Choice] | None) -> None:
        self.numbers += 1
        heapq.heappush(self.heap, _Node(step, self.numbers, choice, rest))

    def advance(self) -> None:
        """Looks at candidates in order, until none can be among the best."""
        while self.heap and self.heap[0].step < self.enough:
            node = heapq.heappop(self.heap)
            self.tell()
            if node.rest is not None:
                self.expand(node.choice, node.rest)
                continue
            self.closely += 1
            found = self.roughly(node.choice)
            if found.fits(self.wanted):
                self.good.append((found.step, node.number, node.choice))
                self.good.sort()
            else:
                self.missed(found.bytes, node.choice)

    def expand(self, choice: Choice, rest: list[Choice]) -> None:
        """Puts a flow's candidates in line, and the next flow of its mesh."""
        for remat in choices.REMATS:
            one = dataclasses.replace(choice, remat=remat)
            if (prog := self.program(one)) is None:
                continue
            found = looks.look(prog, self.wanted, scaled.least(prog))
            if found.fits(self.wanted):
                self.push(found.step, one, None)
            else:
                self.missed(found.bytes, one)
        for i, later in enumerate(rest):
            if (prog := self.program(later)) is not None:
                self.line_up(prog, later, rest[i + 1 :])
                return

    @property
    def enough(self) -> float:
        """Seconds of a step that all of the best take less than."""
        return self.good[KEPT - 1][0] if len(self.good) >= KEPT else math.inf

    def roughly(self, choice: Choice) -> Found:
        """Returns nearly what a plan would say."""
        prog = self.program(choice)
        assert prog is not None, "it was looked at before"
        return looks.look(prog, self.wanted, scaled.costs(prog))

    def exactly(self, choice: Choice) -> Found:
        """Returns what a plan would say."""
        prog = self.program(choice)
        assert prog is not None, "it was looked at before"
        return looks.look(prog, self.wanted, sets=choice.sets(self.experiment))

    def missed(self, size: float, choice: Choice) -> None:
        """Notes a candidate that needs so many bytes at the least."""
        self.numbers += 1
        heapq.heappush(self.near, (-size, self.numbers, choice))
        if len(self.near) > NEAR:
            heapq.heappop(self.near)

    def nearest(self) -> Found | None:
        """Returns what comes nearest to fitting."""
        some = [choice for _, _, choice in self.near]
        least = min(some, key=lambda c: self.roughly(c).bytes, default=None)
        return None if least is None else self.exactly(least)

    def program(self, choice: Choice) -> Program | None:
        """Returns a candidate's program, None if it is refused."""
        how = choice.pipeline
        key = choice.mesh, how.schedule, how.rounds, how.gather
        try:
            changed = choice.of(self.experiment)
            if key not in self.programs:
                layout = self.wanted.layout(changed.mesh)
                self.programs[key] = train.program(changed, layout)
            return varied(self.programs[key], changed)
        except ConfigError as error:
            self.refusal = self.refusal or str(error)
            return None

    def tell(self) -> None:
        """Says how it goes on, now and then."""
        if time.monotonic() > self.said + EVERY:
            self.said = time.monotonic()
            self.say(self.count, self.good[0][0] if self.good else None)
