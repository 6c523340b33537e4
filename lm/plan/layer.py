"""What a layer, the embedding and the head cost a device, read from their own traces.

The blocks that would train are traced on an abstract mesh, forward and backward, under the model's
own policy of what the backward computes again: nothing is compiled and no array exists.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm import batches, gathering, gradients, objectives, sharding, train, trees
from lm.models import encoder_decoder, stack
from lm.models.encoder_decoder import ENCODER, EncoderDecoder
from lm.nn.blockwise import Tokens
from lm.plan import jaxprs, pairs
from lm.program import STACK, Program

REPEATS = 2  # layers that are traced: fewer would be no loop
MARK = "back from here"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one part of a model, for one microbatch on one device."""

    flops_forward: float  # of products
    flops_backward: float  # with what is computed again
    bytes_forward: float  # read from and written to the device's memory
    bytes_backward: float
    waited_forward: float  # bytes of these that no product hides
    waited_backward: float
    starts_forward: float  # kernels
    starts_backward: float
    kept: int  # bytes from forward to backward, beside parameters
    shared: int = 0  # kept too, but once for all layers
    working_forward: int  # bytes held at once, beside parameters and what is kept
    working_backward: int
    gathered_forward: int  # of these, what collectives make
    gathered_backward: int

    @property
    def working(self) -> int:
        """Bytes that the part holds at its fullest moment."""
        return max(self.working_forward, self.working_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Layers, or units of layers of several kinds, that cost the same."""

    what: str  # in words
    count: int  # units that a device runs one after another
    layers: int  # of a unit
    cost: Cost  # of a unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of a model's parts.

    Of a pipeline's stage a group is the chunk of layers of a stack that it runs at a time, once for
    each of its rounds. Its backward runs it forward again, with what `kept` says, and that is
    counted in the backward; from tick to tick a stage keeps the chunk's input only.
    """

    blocks: tuple[Group, ...]
    embed: Cost
    head: Cost  # norm, logits and loss, whose forward forms the gradient too


def costs(prog: Program) -> Costs:
    """Returns what the parts of a model cost a device, for one microbatch."""
    trace = Trace(prog, rows(prog))
    return Costs(blocks=tuple(trace.blocks()), embed=trace.embed(), head=trace.head())


def rows(prog: Program) -> int:
    """Returns the rows of a microbatch on a device."""
    parts = prog.experiment.train.accumulate * prog.microbatches
    return prog.experiment.train.batch_size // (parts * prog.layout.size("batch"))


def stream(prog: Program, name: str = STACK) -> int:
    """Returns the bytes of a microbatch's residual stream on a device, in a stack."""
    row = batches.row(prog.experiment.objective, prog.experiment.data)
    tokens = rows(prog) * row["inputs" if name == ENCODER else "tokens"].shape[0]
    item = prog.experiment.model.compute(prog.layout.platform).itemsize
    return tokens // prog.layout.size("residual") * prog.experiment.model.dim * item


_known: dict[Any, Cost] = {}


class Trace:
    """Traces the parts of a program, on a mesh without replicas: each has the same to do.

    A vmap stands for the replicas in the step (`gradients.apart`), and for the stages around a
    chunk; a mesh that leaves them out has the same shapes on each device.
    """

    def __init__(self, prog: Program, count: int):
        e = prog.experiment
        self.model, self.rows = e.model, count
        rules = prog.layout.rules
        out = {a for name in (*prog.copies, "replica") for a in getattr(rules, name)}
        ends = dataclasses.replace(prog, layout=_without(prog.layout, out))
        self.ends = ends  # the vocabulary is split over stages, too
        inner = _without(ends.layout, set(ends.layout.axes("layers")))
        self.inner = dataclasses.replace(prog, layout=inner)
        self.remat = e.model.remat
        self.key = (
            *(_repr(e.model), repr(e.objective), e.data.length, e.data.isolate),
            *(self.rows, prog.whole, prog.layout.platform, prog.layout.chip, rules),
        )

    def _once(self, make: Callable[[], Cost], prog: Program, *what: Any) -> Cost:
        """Returns a part's costs: a search asks for the same ones again and again."""
        key = (*what, tuple(prog.layout.mesh.shape.values()), *self.key)
        if key not in _known:
            _known[key] = make()
        return _known[key]

    def blocks(self) -> list[Group]:
        """All layers, as a device runs them."""
        if self.inner.staged:
            return [self.chunk(name) for name in self.inner.stacks]
        two = isinstance(self.model, EncoderDecoder.Config)
        return [self.both()] if two else self.groups()

    def groups(self) -> list[Group]:
        """Layers as they are stacked, of each stack two units one after another."""
        units = stack.grouped(self.model.blocks)
        return [
            Group(
                what=pairs.words(unit),
                count=count,
                layers=len(unit),
                cost=self._once(
                    functools.partial(self._group, i),
                    *(self.inner, "group", i, self.remat),
                ),
            )
            for i, (count, unit) in enumerate(units)
        ]

    def _group(self, i: int) -> Cost:
        prog, params = self.inner, _params(self.inner, REPEATS)
        side, some = self._side(params), _batch(prog, self.rows)
        unit = stack.grouped(self.model.blocks)[i][1]

        def run(layers: Any, x: Any, side: Any, some: Any) -> Any:
            blocks = prog.model({**params, STACK: layers}).layers
            blocks = blocks.stacks[i] if isinstance(blocks, stack.Groups) else blocks
            how: Any = {"remat": self.model.remat, "scan": True}
            x, aux, _ = stack.run(blocks, x, side, **how)
            loss, sums = objectives.layers(aux, some)
            return (x, jnp.float32(loss)), sums

        given = (params[STACK], self.stream(prog))
        return self._traced(prog, run, given, (side, some), unit, loop=True)

    def chunk(self, name: str) -> Group:
        """The layers of a stack that a stage runs at a time."""
        places = self.inner.stacks[name].layers
        key = "chunk", name, self.remat, places.shape, places.tobytes()
        run = functools.partial(self._chunk, name)
        made = self._once(run, self.inner, *key)
        _, v, n = places.shape
        words = pairs.words(self.model.stacks[name])
        return Group(what=words, count=v, layers=n, cost=made)

    def _chunk(self, name: str) -> Cost:
        prog, params = self.inner, _params(self.inner, None)
        side, some = self._side(params, name), self._batch(prog, name)
        looks = ENCODER in prog.stacks and name == STACK
        source = self.stream(prog, ENCODER) if looks else None

        def run(layers: Any, x: Any, source: Any, side: Any, some: Any) -> Any:
            part = prog.model({**params, name: layers}).part(name)
            if source is not None:
                side = encoder_decoder.looking(side, some, source)
            places = prog.stacks[name]
            ids = jnp.arange(places.layers.shape[-1], dtype=jnp.int32)
            x, aux = part.stage(x, side, places, ids)
            loss, sums = objectives.layers(aux, some)
            return (x, jnp.float32(loss)), sums

        given = (params[name], self.stream(prog, name), source)
        blocks = () if ENCODER in prog.stacks else self.model.blocks
        cost = self._traced(prog, run, given, (side, some), blocks, loop=False)
        return again(cost)

    def both(self) -> Group:
        """Two stacks with all their layers, and the embedding of what the encoder reads."""
        model = self.model
        assert isinstance(model, EncoderDecoder.Config)
        blocks = (*model.encoder_blocks, *model.blocks)
        cost = self._once(self._both, self.ends, "both", self.remat)
        return Group(what="encoder and decoder", count=1, layers=len(blocks), cost=cost)

    def _both(self) -> Cost:
        prog, params = self.ends, _params(self.ends, None)

        def run(params: Any, some: Any) -> Any:
            keys = gradients.keys(prog, some, jnp.int32(0))
            return prog.model(params).read(some, keys, prog.packed)

        return self._traced(prog, run, (params,), (_batch(prog, self.rows),))

    def embed(self) -> Cost:
        """The embedding, on stages of what is read, too: else it is part of `both`."""
        return self._once(self._embed, self.ends, "embed", self.inner.staged)

    def _embed(self) -> Cost:
        prog, params = self.ends, _params(self.ends, None)
        rest = {k: v for k, v in params.items() if k not in prog.stacks}

        def run(rest: Any, rows: Any) -> Any:
            found = []
            for name, some in rows.items():
                part = prog.model({**params, **rest}).part(name)
                keys = gradients.row_keys(prog, some, jnp.int32(0))
                found.append(part.embed(some["tokens"], some["positions"], keys))
            return found, None

        names = prog.stacks if prog.staged else (STACK,)
        rows = {name: self._batch(prog, name) for name in names}
        return self._traced(prog, run, (rest,), (rows,))

    def head(self) -> Cost:
        """The last norm, the logits and the loss."""
        return self._once(self._head, self.ends, "head")

    def _head(self) -> Cost:
        prog, params = self.ends, _params(self.ends, None)
        rest = {k: v for k, v in params.items() if k != STACK}

        def run(rest: Any, x: Any, some: Any) -> Any:
            model = prog.model({**params, **rest})
            objective = prog.experiment.objective
            return objectives.score(objective, model, model.final(x), some)

        given = (rest, self.stream(prog))
        return self._traced(prog, run, given, (_batch(prog, self.rows),))

    def stream(self, prog: Program, name: str = STACK) -> jax.ShapeDtypeStruct:
        """Returns the shapes of the residual stream of a stack."""
        tokens = self._batch(prog, name)["tokens"]
        dtype = self.model.compute(prog.layout.platform)
        with sharding.use(prog.layout):
            spec = sharding.spec("batch", "residual", None)
        return _shape(prog, (*tokens.shape, self.model.dim), dtype, spec)

    def _batch(self, prog: Program, name: str) -> Any:
        """The shapes of the rows that a stack has."""
        some = _batch(prog, self.rows)
        return encoder_decoder.rows(some) if name == ENCODER else some

    def _side(self, params: Any, name: str = STACK) -> Any:
        """The shapes of what every block of a stack gets besides the stream."""
        prog = self.inner

        def make(params: Any, some: Any) -> Any:
            keys = gradients.row_keys(prog, some, jnp.int32(0))
            tokens = Tokens(some["positions"], some["segments"])
            return prog.model(params).part(name).side(tokens, keys, prog.packed)

        with sharding.use(prog.layout):
            made = jax.eval_shape(make, params, self._batch(prog, name))
        return jax.tree.map(prog.abstract, made)

    def _traced(
        self,
        prog: Program,
        run: Callable[..., Any],
        given: tuple[Any, ...],
        others: tuple[Any, ...],
        blocks: Any = (),
        loop: bool = False,
    ) -> Cost:
        """Returns the cost of `run(*given, *others)`, whose results have an aux.

        Args:
            prog: on whose mesh.
            run: the part.
            given: what it has a gradient for.
            others: the rest.
            blocks: configs of the layers in it.
            loop: of one turn of its loop over layers, not of all.
        """

        def both(given: Any, others: Any) -> Any:
            out, vjp, _ = jax.vjp(lambda *g: run(*g, *others), *given, has_aux=True)
            # Any cotangent will do that is sharded as it should be.
            return vjp(jax.tree.map(lambda x: checkpoint_name(x, MARK), out))

        with sharding.use(prog.layout):
            traced = jax.make_jaxpr(both)(given, others)
        found = jaxprs.gradient(traced, MARK, pairs.unsaid(prog, blocks))
        ahead, behind = found.forward, found.backward
        kept = sum(
            size for shape, size in found.kept if not loop or shape[:1] == (REPEATS,)
        )
        shared = sum(size for _, size in found.kept) - kept
        if loop:
            ahead, behind = (
                max(t.loops, key=lambda one: one.traffic) for t in (ahead, behind)
            )
        return Cost(
            flops_forward=ahead.flops,
            flops_backward=behind.flops,
            bytes_forward=ahead.traffic,
            bytes_backward=behind.traffic,
            waited_forward=ahead.waited,
            waited_backward=behind.waited,
            starts_forward=ahead.starts,
            starts_backward=behind.starts,
            kept=kept // REPEATS if loop else kept,
            shared=shared,
            working_forward=ahead.peak if loop else ahead.peak - kept,
            working_backward=behind.peak,
            gathered_forward=ahead.gathered,
            gathered_backward=behind.gathered,
        )


def again(cost: Cost) -> Cost:
    """Returns the costs of layers whose backward runs their forward again."""
    return dataclasses.replace(
        cost,
        flops_backward=cost.flops_forward + cost.flops_backward,
        bytes_backward=cost.bytes_forward + cost.bytes_backward,
        waited_backward=cost.waited_forward + cost.waited_backward,
        starts_backward=cost.starts_forward + cost.starts_backward,
    )


@functools.lru_cache(maxsize=64)
def _repr(model: Any) -> str:
    """Returns a model's config as text, without what only its layers ask for."""
    return repr(dataclasses.replace(model, remat="none"))


def _without(layout: sharding.Layout, axes: set[str]) -> sharding.Layout:
    """Returns the layout on an abstract mesh with one device along these mesh axes."""
    return sized(layout, dict.fromkeys(axes, 1))


def sized(layout: sharding.Layout, changes: dict[str, int]) -> sharding.Layout:
    """Returns the layout on an abstract mesh with so many devices along these mesh axes."""
    sizes = {**layout.mesh.shape, **changes}
    types = (AxisType.Explicit,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return dataclasses.replace(layout, mesh=mesh)


def _batch(prog: Program, count: int) -> Any:
    return train.abstract_batch(prog, count * prog.layout.size("batch"))


def _params(prog: Program, repeats: int | None) -> Any:
    """The shapes of all parameters, of stacked ones so many rows; None: those of a chunk."""
    specs = prog.working if prog.whole else prog.specs
    found = {}
    for path, x in prog.shapes.items():
        shape, spec = x.shape, specs[path]
        if prog.stacked(path):
            count = repeats or shape[0] // math.prod(prog.places.shape[:2])
            shape, spec = (count, *shape[1:]), P(None, *spec[1:])
        dtype = x.dtype
        if prog.whole:
            dtype = gathering.dtypes(prog, path)[1]
        found[path] = _shape(prog, shape, dtype, spec)
    return trees.nest(found)


def _shape(prog: Program, shape: Any, dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
    place = NamedSharding(prog.layout.mesh, spec)  # type: ignore[arg-type]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)
