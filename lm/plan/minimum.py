"""What a train step has to send between devices: a formula for each reason to.

Bytes are those that a device receives in one step (`collectives.received`: of n devices a sum
takes 2 (n-1)/n of its operand, a reduce-scatter (n-1)/n, …). The minimum is that of this way to
train, not of all ways: ZeRO-3 gathers a weight whenever it is used, a pipeline works in every tick
of its timetable, idle stages too, and a tensor-parallel layer reduces what Megatron's does. Two
sums that XLA makes larger than they have to be are counted as it makes them, see
`_Count.gradients`. Left out are loss scalars, ids, routers' counts and gradients of norms and
biases: together below 1 % of a step with 4096 tokens a device or more and a width of 1024 or more.

Letters, of one device in one pass: b rows, t tokens of a row, D embed, K kv heads, H head dim, E
experts. C devices split the length.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from lm import config, gathering, gradients, sharding
from lm.config import ConfigError
from lm.models.transformer import Transformer
from lm.nn.attend import Case
from lm.nn.blockwise import Mask
from lm.nn.moe import Dropless, Moe
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


@dataclasses.dataclass(frozen=True)
class Passes:
    """How often a device runs each part in one step, over all microbatches."""

    forward: int  # its layers; the embedding as well
    head: int
    backward: int


def passes(prog: Program) -> Passes:
    """Returns how often a device runs each part: of a pipeline in every tick, idle or not."""
    A = prog.experiment.train.accumulate
    if not prog.staged:
        return Passes(A, A, A)
    ticks = dict.fromkeys("FHB", 0)
    for loop in gradients.table(prog).loops:
        for phase in loop.phases:
            for kind in phase.kinds:
                ticks[kind] += loop.times * phase.ticks
    return Passes(*(A * ticks[kind] for kind in "FHB"))


def totals(terms: Iterable[Term]) -> dict[tuple[str, frozenset[str]], float]:
    """Returns the bytes by kind and mesh axes."""
    sums: dict[tuple[str, frozenset[str]], float] = {}
    for term in terms:
        key = term.kind, term.axes
        sums[key] = sums.get(key, 0.0) + term.bytes
    return sums


def of(prog: Program) -> list[Term]:
    """Returns all that a train step of `prog` has to send.

    Raises:
        ConfigError: there is no formula for a part of it.
    """
    count = _Count(prog)
    with sharding.use(prog.layout):
        found = [
            *count.weights(),
            *count.gradients(),
            *count.tensor(),
            *count.head(),
            *count.stages(),
            *count.length(),
            *count.experts(),
        ]
    return [term for term in found if term.bytes]


class _Count:
    """The formulas, by what is split."""

    def __init__(self, prog: Program):
        self.prog, self.layout, e = prog, prog.layout, prog.experiment
        split = [a for a in ("mlp", "length", "layers") if self.layout.axes(a)]
        if split and not isinstance(e.model, Transformer.Config):
            axes = ", ".join(f"mesh.{a}" for a in self.layout.axes(split[0]))
            raise ConfigError(
                f"model={config.kind(type(e.model))}: there is no formula for what {axes} sends"
            )
        self.model: Any = e.model
        single = self.model.dtype == "float32" or (
            self.model.dtype == "auto" and self.layout.platform == "cpu"
        )
        self.item = FP32 if single else 2  # bytes of an entry in compute
        A, M = e.train.accumulate, prog.microbatches
        rows = e.train.batch_size // (A * M * self.layout.size("batch"))
        self.b, self.t = rows, e.data.length // self.layout.size("length")
        self.act = rows * self.t * self.model.dim * self.item  # [b, t, D]
        self.passes = passes(prog)
        # Parts of layers that one pass runs: those of a chunk on a stage.
        self.mixers = len(prog.computed("mixer"))
        ffns = prog.computed("ffn")
        self.sparse = sum(isinstance(c, Moe.Config) for c in ffns)
        self.dense = len(ffns) - self.sparse
        # How often a layer's forward is run again to go back: by a stage whatever the policy, and
        # with one twice, but for the last layer of a chunk: that one's output is not needed.
        kept = self.model.remat == "none"
        self.before = 1 - 1 / prog.places.shape[-1] if prog.staged else 0.0
        self.again = 1.0 if prog.staged and kept else self.before + (not kept)
        # Mesh axes whose devices have gradients of their own until the end of the step.
        self.mapped = self.layout.axes("replica") if gradients.apart(prog) else ()
        self.held = self.layout.axes("embed") if prog.whole else ()

    def term(
        self, what: str, kind: str, axes: tuple[str, ...], operand: float, times: float
    ) -> Term:
        """An operand's bytes, so many times; of an all-gather the whole result's, not a share's."""
        n = math.prod(self.layout.mesh.shape[a] for a in axes)
        if kind == "all-gather":
            operand /= n
        sent = collectives.received(kind, n, operand)
        return Term(what, kind, frozenset(axes), times * sent)

    def _split(self, path: str) -> tuple[str, ...]:
        return tuple(
            a for entry in self.prog.specs[path] for a in sharding.names(entry)
        )

    def _whole(self, path: str, but: tuple[str, ...] = ()) -> float:
        """Entries of a parameter on a device; `but`: gathered over these axes."""
        over = [a for a in self._split(path) if a not in but]
        shards = math.prod(self.layout.mesh.shape[a] for a in over)
        return math.prod(self.prog.shapes[path].shape) / shards

    def _uses(self, path: str) -> list[tuple[str, float]]:
        """Returns who uses a parameter, and how much of it at a time: rounds have a chunk each."""
        if path.split("/")[0] == STACK:
            return [("layers", self.prog.use(path))]
        if path == "embed_vd":
            return (
                [("lookup", 1.0), ("head", 1.0)]
                if self.model.tied
                else [("lookup", 1.0)]
            )
        return [("head" if path == "head_vd" else "lookup", 1.0)]

    def weights(self) -> Iterable[Term]:
        """ZeRO-3: what is stored in parts is gathered where it is used, in the dtype of compute.

        A layer's weights once forward and, where the forward is run again, once backward; the
        embedding's once for the lookup and once for the head, whose one pass is both. Of a pipeline
        with `gather=step`, all once.
        """
        for path, axes in self.prog.axes.items():
            over = tuple(a for a in self._split(path) if a in sharding.GATHERED)
            if not over:
                continue
            if self.held:
                sent, _ = gathering.dtypes(self.prog, path)
                whole = self._whole(path, over) * sent.itemsize
                yield self.term("weights: step", "all-gather", over, whole, 1)
                continue
            item = FP32 if "choice" in axes else self.item  # routers decide in fp32
            for use, part in self._uses(path):
                times = {
                    "layers": self.passes.forward + self.again * self.passes.backward,
                    "lookup": self.passes.forward,
                    "head": self.passes.head,
                }[use]
                whole = self._whole(path, over) * part * item
                yield self.term(f"weights: {use}", "all-gather", over, whole, times)

    def gradients(self) -> Iterable[Term]:
        """A gradient is reduced once for each backward over the axes that split tokens: to the
        shares that are stored (a reduce-scatter), or whole; over data only once a step, in fp32,
        where replicas add up apart (`lm.gradients.apart`), and so to the shares of a pipeline with
        `gather=step`. Else in the dtype of compute, the head's in fp32; of a tied embedding lookup
        and head have one gradient, the head's.

        Not the least: a tied embedding in shares has two, for the head's is in its shares before
        the lookup's is known. And under ZeRO-1 layers' gradients are reduced whole in the loop over
        them, and cut after it.
        """
        tokens = self.layout.axes("batch") + self.layout.axes("length")
        for path, axes in self.prog.axes.items():
            if not {"embed", "vocab", "mlp", "heads", "kv_heads"} & set(axes) or (
                axes[-1] in ("norm", "head_dim") and "embed" not in axes
            ):
                continue  # norms, biases
            split = self._split(path)
            here = self.layout.axes("dispatched") if "expert" in axes else tokens
            here = tuple(a for a in here if a not in self.held)
            once = self._whole(path, self.held) * FP32
            over = tuple(a for a in self.held if a in split)
            yield self.term("gradients: step", "reduce-scatter", over, once, 1)
            parts = tuple(a for a in here if a in split)
            rest = tuple(a for a in here if a not in split and a not in self.mapped)
            use, part = self._uses(path)[-1]
            item = FP32 if use == "head" or "choice" in axes else self.item
            times = self.passes.head if use == "head" else self.passes.backward
            whole = self._whole(path, parts) * part * item
            yield self.term(f"gradients: {use}", "reduce-scatter", parts, whole, times)
            if path == "embed_vd" and self.model.tied:
                looked = self._whole(path, parts) * self.item
                often = self.passes.backward
                yield self.term(
                    "gradients: lookup", "reduce-scatter", parts, looked, often
                )
            share = self._whole(path) * part * item
            kind = in_loop = "all-reduce"
            if self.prog.updates[path] != self.prog.specs[path]:  # ZeRO-1
                kind = "reduce-scatter"
                in_loop = "all-reduce" if use == "layers" else kind
                moved = self.layout.axes("replica")
                stored = self._whole(path) * FP32
                yield self.term("weights: ZeRO-1", "all-gather", moved, stored, 1)
            yield self.term(f"gradients: {use}", in_loop, rest, share, times)
            once = self._whole(path) * FP32
            yield self.term(f"gradients: {use}", kind, self.mapped, once, 1)

    def tensor(self) -> Iterable[Term]:
        """Megatron: the sum of attention's and of the feed-forward's output, and of the gradient
        of their inputs; under sequence parallelism each sum is a reduce-scatter behind and an
        all-gather before. A recomputed layer forms attention's output again, not its last one.
        """
        over = self.layout.axes("mlp")
        outs = self._repeated("attention")
        split = over and over[0] in self.layout.axes("residual")
        back, forward = self.passes.backward, self.passes.forward
        again = self.again * back  # inputs are gathered again
        for operand, count, more in (
            (self.act, self.mixers, outs),
            (self.act, self.dense, self.before * back * self.dense),
            (self._routed(), self.sparse, self.before * back * self.sparse),
        ):
            sums = (forward + back) * count + more
            if not split:
                yield self.term("tensor: layers", "all-reduce", over, operand, sums)
                continue
            yield self.term("tensor: layers", "reduce-scatter", over, operand, sums)
            gathers = (forward + again + back) * count
            yield self.term("tensor: layers", "all-gather", over, operand, gathers)

    def _repeated(self, what: str) -> float:
        """How often a part is formed again, in a recomputed layer or in a stage's backward."""
        formed = {
            "none": (),
            "dots": ("keys",),
            "attention": ("attention",),
            "full": ("attention", "keys"),
            "offload": ("attention", "keys"),
        }[self.model.remat]
        again = self.before + (what in formed)
        if self.prog.staged and self.model.remat == "none":
            again = 1.0
        return self.passes.backward * self.mixers * again

    def head(self) -> Iterable[Term]:
        """The vocabulary is split: a row of the embedding is summed over all who may have it, the
        gradient of the head's input over all who have logits, and each token's maximum, sum and
        label are (fp32)."""
        over, p = self.layout.axes("vocab"), self.passes
        inside = tuple(a for a in over if a in self.layout.axes("residual"))
        rest = tuple(a for a in over if a not in inside)
        kept = self.act / math.prod(self.layout.mesh.shape[a] for a in inside)
        for what, sums, gathers in (
            ("lookup", p.forward, p.backward),
            ("head", p.head, p.head),
        ):
            if inside:  # its length is split behind the lookup, and before the head
                yield self.term(what, "reduce-scatter", inside, self.act, sums)
                yield self.term(what, "all-gather", inside, self.act, gathers)
                yield self.term(what, "all-reduce", rest, kept, sums)
            else:
                yield self.term(what, "all-reduce", over, self.act, sums)
        smoothing = getattr(self.prog.experiment.objective, "label_smoothing", 0.0)
        numbers = 3 + bool(smoothing)
        size = numbers * self.b * self.t * FP32
        yield self.term("loss", "all-reduce", over, size, p.head)

    def stages(self) -> Iterable[Term]:
        """Every tick passes activations on, and gradients back; all stages get the last one's
        output for the head, and the first one's gradient for the embedding, by a sum."""
        if not self.prog.staged:
            return
        over, p = self.layout.axes("layers"), self.passes
        inside = set(self.layout.axes("residual")) - set(self.layout.axes("length"))
        act = self.act / math.prod(self.layout.mesh.shape[a] for a in inside)
        yield self.term(
            "stages", "collective-permute", over, act, p.forward + p.backward
        )
        yield self.term("stages: ends", "all-reduce", over, act, p.head + p.backward)

    def length(self) -> Iterable[Term]:
        """Keys, values and their ids of the other devices come, forward and backward (and again
        where attention is), and their gradients in fp32 go home: by C - 1 hops, or gathered."""
        over, C = self.layout.axes("length"), self.layout.size("length")
        if C == 1:
            return
        heads = max(1, self.model.kv_heads // self.layout.size("kv_heads"))
        entries = 2 * self.b * self.t * heads * self.model.head_dim
        shared = entries * self.item + 8 * self.b * self.t
        forward = self.passes.forward * self.mixers
        back = self.passes.backward * self.mixers
        if self._context() == "ring":
            again = self._repeated("keys")
            kind, size = "collective-permute", (C - 1) * shared
            yield self.term("keys", kind, over, size, forward + again + back)
            grads = (C - 1) * entries * FP32
            yield self.term("keys: gradients", kind, over, grads, back)
            return
        # What is gathered to form attention again serves its backward too.
        yield self.term("keys", "all-gather", over, C * shared, forward + back)
        grads = C * entries * FP32
        yield self.term("keys: gradients", "reduce-scatter", over, grads, back)

    def _context(self) -> str:
        T = self.prog.experiment.data.length
        case = Case(
            platform=self.layout.platform,
            queries=T,
            keys=T,
            head_dim=self.model.head_dim,
            dtype="bfloat16",
            packed=True,
            mask=Mask(scale=1.0),
            shards=self.layout.size("length"),
        )
        return case.share(self.model.attention.context)

    def _routed(self) -> float:
        """Bytes of a device's buffers for experts: E times the room of each of its rows. Where
        none is dropped, as much as there are choices: routing in balance."""
        ffn = self.model.ffn
        if not isinstance(ffn, Moe.Config):
            return 0.0
        room = ffn.room(self.prog.experiment.data.length)
        slots = self.b * self.t * ffn.top_k
        if room is not None and not isinstance(ffn.dispatch, Dropless):
            slots = self.b * ffn.experts * min(room, self.t)
        return slots * self.model.dim * self.item

    def experts(self) -> Iterable[Term]:
        """Buffers go to the experts and come back, both ways; again in a recomputed layer."""
        over = self.layout.axes("expert")
        p = self.passes
        runs = 2 * (p.forward + p.backward + self.again * p.backward)
        yield self.term(
            "experts", "all-to-all", over, self._routed(), runs * self.sparse
        )
