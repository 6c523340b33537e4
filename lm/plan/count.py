"""What the formulas of `lm.plan.minimum` are made of: passes, layers and sizes on one device."""

import dataclasses
import math
from typing import Any

from lm import batches, gradients, sharding
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import ENCODER
from lm.models.stack import Block
from lm.nn.moe import Moe
from lm.plan import collectives
from lm.program import STACK, Program

FP32 = 4


@dataclasses.dataclass(frozen=True)
class Term:
    """One reason to send something."""

    what: str
    kind: str  # of `collectives.KINDS`
    axes: frozenset[str]  # mesh axes that it crosses
    bytes: float  # that a device receives in a step
    waits: float = 0.0  # times that nothing else is done until a few bytes have come


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a device runs each part in one step, over all microbatches."""

    forward: int  # its layers; the embedding as well
    head: int
    backward: int


def passes(prog: Program) -> Passes:
    """Returns how often a device runs each part: of a pipeline in every tick, idle or not.

    Of two stacks each runs so often.
    """
    A = prog.experiment.train.accumulate
    if not prog.staged:
        return Passes(A, A, A)
    ticks = dict.fromkeys("FHB", 0)
    for loop in gradients.table(prog).loops:
        for phase in loop.phases:
            for kind in phase.kinds:
                ticks[kind] += loop.times * phase.ticks
    return Passes(*(A * ticks[kind] for kind in "FHB"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a stack that one pass runs: those of a chunk on a stage."""

    block: (
        Block.Config | None
    )  # one of them, for what all have in common; None: no layers
    T: int  # tokens of a whole row
    t: int  # of these, those of a device
    act: float  # bytes of the residual stream [b, t, D], not split over tensor
    mixers: int
    crosses: int  # attentions to the other stack
    dense: int  # feed-forward parts
    sparse: int  # those of experts
    # How often a layer's forward is run again to go back: by a stage whatever the policy, and
    # with one twice. The output of a chunk's last layer is not needed, but where layers are
    # scanned the loop forms it, too.
    again: float
    before: (
        float  # of these runs, those that are not for what follows in the same layer
    )

    @property
    def looks(self) -> int:
        """Attentions."""
        return self.mixers + self.crosses


class Count:
    """Sizes of a program on one device."""

    def __init__(self, prog: Program):
        self.prog, self.layout, e = prog, prog.layout, prog.experiment
        self.model: Any = e.model
        single = self.model.dtype == "float32" or (
            self.model.dtype == "auto" and self.layout.platform == "cpu"
        )
        self.item = FP32 if single else 2  # bytes of an entry in compute
        A, M = e.train.accumulate, prog.microbatches
        self.b = e.train.batch_size // (A * M * self.layout.size("batch"))
        self.passes = passes(prog)
        self.stacks = {name: self._layers(name) for name in prog.stacks}
        # Mesh axes whose devices have gradients of their own until the end of the step.
        self.mapped = self.layout.axes("replica") if gradients.apart(prog) else ()
        self.held = self.layout.axes("embed") if prog.whole else ()

    @property
    def written(self) -> Layers:
        """The stack that every model has."""
        return self.stacks[STACK]

    def _layers(self, name: str) -> Layers:
        prog, e = self.prog, self.prog.experiment
        T = e.data.length if name == ENCODER else batches.written(e.objective, e.data)
        t = T // self.layout.size("length")
        found = {
            part: [c for c in prog.computed(part, name) if c is not None]
            for part in ("mixer", "cross", "ffn")
        }
        sparse = sum(isinstance(c, Moe.Config) for c in found["ffn"])
        kept = self.model.remat == "none"
        last = prog.stacks[name].layers.shape[-1]
        before = 0.0
        if prog.staged:
            before = float(last > 1) if self.model.scan else 1 - 1 / last
        blocks = self.model.stacks[name]
        return Layers(
            block=blocks[0] if blocks else None,
            T=T,
            t=t,
            act=self.b * t * self.model.dim * self.item,
            mixers=len(found["mixer"]),
            crosses=len(found["cross"]),
            dense=len(found["ffn"]) - sparse,
            sparse=sparse,
            again=1.0 if prog.staged and kept else before + (not kept),
            before=before,
        )

    @property
    def lookups(self) -> int:
        """How often a stack's ids are looked up: on stages in the backward, too, where it needs
        what they gave, for a norm stands behind."""
        normed = isinstance(self.model, Encoder.Config) and self.model.norms == "post"
        again = normed and self.prog.staged
        return self.passes.forward + again * self.passes.backward

    def term(
        self, what: str, kind: str, axes: tuple[str, ...], operand: float, times: float
    ) -> Term:
        """An operand's bytes, so many times; of an all-gather the whole result's, not a share's."""
        n = math.prod(self.layout.mesh.shape[a] for a in axes)
        if kind == "all-gather":
            operand /= n
        sent = collectives.received(kind, n, operand)
        return Term(what, kind, frozenset(axes), times * sent)

    def split(self, path: str) -> tuple[str, ...]:
        """Returns the mesh axes over which a parameter is stored in parts."""
        return tuple(
            a for entry in self.prog.specs[path] for a in sharding.names(entry)
        )

    def whole(self, path: str, but: tuple[str, ...] = ()) -> float:
        """Entries of a parameter on a device; `but`: gathered over these axes."""
        over = [a for a in self.split(path) if a not in but]
        shards = math.prod(self.layout.mesh.shape[a] for a in over)
        return math.prod(self.prog.shapes[path].shape) / shards

    def repeated(self, layers: Layers, what: str) -> float:
        """How often a part is formed again, in a recomputed layer or in a stage's backward."""
        formed = {
            "none": (),
            "dots": ("keys",),
            "attention": ("attention",),
            "full": ("attention", "keys"),
            "offload": ("attention", "keys"),
        }[self.model.remat]
        again = layers.before + (what in formed)
        if self.prog.staged and self.model.remat == "none":
            again = 1.0
        return self.passes.backward * again
