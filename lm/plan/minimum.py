"""What a train step has to send between devices: a formula for each reason to.

Bytes are those that a device receives in one step (`collectives.received`: of n devices a sum
takes 2 (n-1)/n of its operand, a reduce-scatter (n-1)/n, …). The minimum is that of this way to
train, not of all ways: ZeRO-3 gathers a weight whenever it is used, a pipeline works in every tick
of its timetable, idle stages too, and a tensor-parallel layer reduces what Megatron's does. Two
sums that XLA makes larger than they have to be are counted as it makes them, see
`_Count.gradients`. Left out are loss scalars, ids, routers' counts and gradients of norms and
biases: together below 1 % of a step with 4096 tokens a device or more and a width of 1024 or more.

Of two stacks each has its own passes, tokens and layers (`lm.plan.count`); what layers send inside,
over tensor, seq and expert, is in `lm.plan.within`.

Letters, of one device in one pass: b rows, t tokens of a row, D embed, K kv heads, H head dim, E
experts. C devices split the length.
"""

import math
from collections.abc import Iterable

from lm import gathering, sharding
from lm.batches import Classification
from lm.models.encoder_decoder import ENCODER
from lm.nn.heads import END
from lm.plan import count, within
from lm.plan.count import FP32, Layers, Term
from lm.program import Program


def totals(terms: Iterable[Term]) -> dict[tuple[str, frozenset[str]], float]:
    """Returns the bytes by kind and mesh axes."""
    sums: dict[tuple[str, frozenset[str]], float] = {}
    for term in terms:
        key = term.kind, term.axes
        sums[key] = sums.get(key, 0.0) + term.bytes
    return sums


def of(prog: Program) -> list[Term]:
    """Returns all that a train step of `prog` has to send."""
    own = _Count(prog)
    with sharding.use(prog.layout):
        found = [
            *own.weights(),
            *own.gradients(),
            *own.head(),
            *own.stages(),
            *within.of(own),
        ]
    return [term for term in found if term.bytes]


class _Count(count.Count):
    """The formulas around the layers, by what is split."""

    def _uses(self, path: str) -> list[tuple[str, float]]:
        """Returns who uses a parameter, and how much of it at a time: rounds have a chunk each."""
        name = path.split("/")[0]
        if name in self.prog.stacks:
            return [("layers", self.prog.use(path))]
        if path == "embed_vd":
            lookups = [("lookup", 1.0)] * len(self.prog.stacks)
            return [*lookups, ("head", 1.0)] if self.tied else lookups
        return [("head" if name in ("head_vd", END) else "lookup", 1.0)]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; there is none of words where texts are told apart."""
        words = not isinstance(self.prog.experiment.objective, Classification)
        return self.model.tied and words

    def weights(self) -> Iterable[Term]:
        """ZeRO-3: what is stored in parts is gathered where it is used, in the dtype of compute.

        A layer's weights once forward and, where the forward is run again, once backward; the
        embedding's once for the lookup and once for the head, whose one pass is both. Of a pipeline
        with `gather=step`, all once.
        """
        for path, axes in self.prog.axes.items():
            over = tuple(a for a in self.split(path) if a in sharding.GATHERED)
            if not over:
                continue
            if self.held:
                sent, _ = gathering.dtypes(self.prog, path)
                whole = self.whole(path, over) * sent.itemsize
                yield self.term("weights: step", "all-gather", over, whole, 1)
                continue
            item = FP32 if "choice" in axes else self.item  # routers decide in fp32
            for use, part in self._uses(path):
                times = self.passes.head if use == "head" else self.lookups
                if use == "layers":
                    times = self.passes.forward
                    layers = self.stacks[path.split("/")[0]]
                    times += layers.again * self.passes.backward
                whole = self.whole(path, over) * part * item
                yield self.term(f"weights: {use}", "all-gather", over, whole, times)

    def gradients(self) -> Iterable[Term]:
        """A gradient is reduced once for each backward over the axes that split tokens: to the
        shares that are stored (a reduce-scatter), or whole; over data only once a step, in fp32,
        where replicas add up apart (`lm.gradients.apart`), and so to the shares of a pipeline with
        `gather=step`. Else in the dtype of compute, the head's in fp32; of a tied embedding lookup
        and head have one gradient, the head's. Each stack's lookup has one of its own.

        Not the least: a tied embedding in shares has two, for the head's is in its shares before
        the lookup's is known. And under ZeRO-1 layers' gradients are reduced whole in the loop over
        them, and cut after it.
        """
        tokens = self.layout.axes("batch") + self.layout.axes("length")
        for path, axes in self.prog.axes.items():
            wide = len(axes) - ("layers" in axes) > 1
            wide = wide and {"embed", "vocab", "mlp", "heads", "kv_heads"} & set(axes)
            if not wide or (axes[-1] in ("norm", "head_dim") and "embed" not in axes):
                continue  # norms, biases
            split = self.split(path)
            here = self.layout.axes("dispatched") if "expert" in axes else tokens
            here = tuple(a for a in here if a not in self.held)
            once = self.whole(path, self.held) * FP32
            over = tuple(a for a in self.held if a in split)
            yield self.term("gradients: step", "reduce-scatter", over, once, 1)
            parts = tuple(a for a in here if a in split)
            rest = tuple(a for a in here if a not in split and a not in self.mapped)
            uses = self._uses(path)
            use, part = uses[-1]
            fp32 = (use == "head" and not path.startswith(END)) or "choice" in axes
            item = FP32 if fp32 else self.item
            often = self.passes.backward * uses.count(("lookup", 1.0))
            times = self.passes.head if use == "head" else self.passes.backward
            times = often if use == "lookup" else times
            whole = self.whole(path, parts) * part * item
            yield self.term(f"gradients: {use}", "reduce-scatter", parts, whole, times)
            if path == "embed_vd" and self.tied:
                looked = self.whole(path, parts) * self.item
                yield self.term(
                    "gradients: lookup", "reduce-scatter", parts, looked, often
                )
            share = self.whole(path) * part * item
            kind = in_loop = "all-reduce"
            if self.prog.updates[path] != self.prog.specs[path]:  # ZeRO-1
                kind = "reduce-scatter"
                in_loop = "all-reduce" if use == "layers" else kind
                moved = self.layout.axes("replica")
                stored = self.whole(path) * FP32
                yield self.term("weights: ZeRO-1", "all-gather", moved, stored, 1)
            yield self.term(f"gradients: {use}", in_loop, rest, share, times)
            once = self.whole(path) * FP32
            yield self.term(f"gradients: {use}", kind, self.mapped, once, 1)

    def head(self) -> Iterable[Term]:
        """The vocabulary is split: a row of the embedding is summed over all who may have it, the
        gradient of the head's input over all who have logits, and each token's maximum, sum and
        label are (fp32)."""
        p, objective = self.passes, self.prog.experiment.objective
        for layers in self.stacks.values():
            yield from self._ends("lookup", layers, self.lookups, p.backward)
        if isinstance(objective, Classification):
            return
        yield from self._ends("head", self.written, p.head, p.head)
        numbers = 3 + bool(getattr(objective, "label_smoothing", 0.0))
        size = numbers * self.b * self.written.t * FP32
        yield self.term("loss", "all-reduce", self.layout.axes("vocab"), size, p.head)

    def _ends(
        self, what: str, layers: Layers, sums: int, gathers: int
    ) -> Iterable[Term]:
        over, m = self.layout.axes("vocab"), self.model
        inside = tuple(a for a in over if a in self.layout.axes("residual"))
        rest = tuple(a for a in over if a not in inside)
        kept = layers.act / math.prod(self.layout.mesh.shape[a] for a in inside)
        # The length is split behind the lookup, and before the head.
        yield self.term(what, "all-gather", inside, layers.act, gathers)
        added = m.learned or m.sinusoidal or m.embed_scale != 1
        if not inside or (
            what == "lookup" and added
        ):  # to the whole, which is cut then
            yield self.term(what, "all-reduce", over, layers.act, sums)
            return
        yield self.term(what, "reduce-scatter", inside, layers.act, sums)
        yield self.term(what, "all-reduce", rest, kept, sums)

    def stages(self) -> Iterable[Term]:
        """Every tick passes activations on, and gradients back; all stages get the last one's
        output for the head, or to look at, and the first one's gradient for the embedding, by a
        sum. What is looked at has a gradient on each stage; these are summed once, in fp32."""
        if not self.prog.staged:
            return
        over, p = self.layout.axes("layers"), self.passes
        inside = set(self.layout.axes("residual")) - set(self.layout.axes("length"))
        shares = math.prod(self.layout.mesh.shape[a] for a in inside)
        kind = "collective-permute"
        for layers in self.stacks.values():
            act = layers.act / shares
            yield self.term("stages", kind, over, act, p.forward + p.backward)
            ends = p.head + p.backward
            yield self.term("stages: ends", "all-reduce", over, act, ends)
        if ENCODER in self.stacks:
            act = self.stacks[ENCODER].act / shares
            often = self.prog.experiment.train.accumulate * self.prog.microbatches
            grads = act / self.item * FP32
            yield self.term("stages: looked at", "all-reduce", over, grads, often)
