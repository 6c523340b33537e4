"""Loss and gradient of a global batch: whole, in microbatches, or through the stages of a pipeline.

Shapes: B global batch, A accumulated parts, M microbatches of a pipeline, R data replicas, b rows
of a microbatch on one replica, T length, P stages, v rounds, l layers of a chunk.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array

from lm import gathering, objectives, sharding
from lm.batches import Objective
from lm.models import encoder_decoder, pipeline, stack, stages, timetable
from lm.models.encoder_decoder import ENCODER
from lm.nn.blockwise import Tokens
from lm.nn.layers import dropout_keys
from lm.program import STACK, Params, Program

Sums = dict[str, Array]


def of(
    prog: Program,
    params: Params,
    batch: objectives.Batch,
    step: Array,
    count: Array,
    poison: bool = False,
) -> tuple[Sums, Params]:
    """Returns the batch's sums (`loss` divided by `count`) and the gradient of that loss.

    Where `apart`, the gradients of each data replica add up on their own, in fp32; they are
    reduced over data once, by the last sum. `poison` is for tests, see `pipeline.run`.
    """
    A = prog.experiment.train.accumulate

    def whole(params: Params, batch: objectives.Batch) -> tuple[Array, Sums]:
        total, sums = objectives.causal(
            prog.experiment.objective,
            prog.model(params),
            batch,
            keys(prog, batch, step),
            prog.packed,
        )
        return total / count, {**sums, "loss": total / count}

    def one(params: Params, batch: objectives.Batch) -> tuple[Sums, Params]:
        if prog.staged:
            return _staged(prog, params, batch, step, count, poison=poison)
        if apart(prog):  # a pipeline's microbatches, here one
            batch = jax.tree.map(_first, batch)
        (_, sums), grads = jax.value_and_grad(whole, has_aux=True)(params, batch)
        return sums, grads

    if not apart(prog):
        return one(params, batch)
    with _copied(prog, params) as (whole_params, R, lead):
        parts = _parts(batch, A, prog.microbatches, R, lead)
        if A == 1:
            part = jax.tree.map(_first, parts)
            sums, grads = jax.vmap(one, (None, 1))(whole_params, part)
        else:

            def add(carry: Params, part: objectives.Batch) -> tuple[Params, Sums]:
                sums, grads = jax.vmap(one, (None, 1))(whole_params, part)
                return jax.tree.map(jnp.add, carry, grads), sums

            def zeros(x: Array) -> Array:
                spec = P(lead, *jax.typeof(x).sharding.spec)
                return jnp.zeros((R, *x.shape), jnp.float32, out_sharding=spec)

            start = jax.tree.map(zeros, whole_params)
            grads, sums = jax.lax.scan(add, start, parts)
            sums = jax.tree.map(lambda x: x.sum(0), sums)
    return jax.tree.map(lambda x: x.sum(0), sums), gathering.total(prog, grads)


def apart(prog: Program) -> bool:
    """Returns whether each data replica has a gradient of its own until the end of the step.

    With microbatches, so that there is one reduction over data; and where devices store shares,
    so that only shares are reduced over data (else XLA reduces whole gradients over all devices
    and cuts the shares out of them).
    """
    parts = prog.experiment.train.accumulate > 1 or prog.staged
    return parts or (prog.layout.size("replica") > 1 and prog.layout.size("embed") > 1)


def scores(
    prog: Program, objective: Objective, params: Params, batch: objectives.Batch
) -> Sums:
    """Returns the sums of a batch, run forward through the stages without dropout."""
    prog = dataclasses.replace(
        prog,
        experiment=dataclasses.replace(
            prog.experiment,
            objective=objective,
            model=dataclasses.replace(prog.experiment.model, dropout=0.0),
        ),
    )
    zero, one = jnp.int32(0), jnp.float32(1)
    with _copied(prog, params) as (whole, R, lead):
        parts = _parts(batch, 1, prog.eval_microbatches, R, lead)

        def staged(batches: objectives.Batch) -> Sums:
            return _staged(prog, whole, batches, zero, one, forward=True)[0]

        sums = jax.vmap(staged, 1)(jax.tree.map(_first, parts))
        return jax.tree.map(lambda x: x.sum(0), sums)


@contextlib.contextmanager
def _copied(prog: Program, params: Params) -> Iterator[tuple[Params, int, Any]]:
    """Inside, a vmap stands for the devices whose gradients add up apart: yields what they compute
    with, their number, and the spec of an axis with an entry for each."""
    layout = sharding.current()
    axes = [a for name in prog.copies for a in layout.axes(name)]
    count = math.prod(layout.mesh.shape[a] for a in axes)
    params = gathering.whole(prog, params)
    with sharding.mapped(*prog.copies):
        yield params, count, axes[0] if len(axes) == 1 else tuple(axes) or None


def _first(a: Array) -> Array:
    return jax.lax.index_in_dim(a, 0, 0, keepdims=False)


def _parts(batch: objectives.Batch, A: int, M: int, R: int, lead: Any) -> Any:
    """[B, ...] → [A, M, R, b, ...], every device keeping its own rows."""
    rows = sharding.spec("batch")[0]

    def split(x: Array) -> Array:
        tail = jax.typeof(x).sharding.spec[1:]
        shape = (R, x.shape[0] // (R * A * M), A * M, *x.shape[1:])
        x = x.reshape(shape, out_sharding=P(lead, rows, None, *tail))
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(A, M, *x.shape[1:])

    return jax.tree.map(split, batch)


def keys(
    prog: Program, batch: objectives.Batch, step: Array
) -> Callable[[int], Array] | None:
    """Returns the keys of dropout by the length of rows, None without dropout."""
    if not prog.experiment.model.dropout:
        return None
    seed = prog.experiment.train.seed
    return functools.partial(dropout_keys, seed, step, batch["index"])


def row_keys(prog: Program, batch: objectives.Batch, step: Array) -> Array | None:
    """Returns the keys of a batch's dropout, [B, T]; None without dropout."""
    of = keys(prog, batch, step)
    return of and of(batch["tokens"].shape[1])


def table(prog: Program, forward: int | None = None) -> timetable.Timetable:
    """Returns the timetable of a step, or of so many microbatches forward only."""
    P, v, _ = prog.places.shape
    if forward is not None:
        return timetable.make("forward", P, forward, v)
    schedule = prog.experiment.pipeline.schedule
    return timetable.make(schedule, P, prog.microbatches, v)


def _staged(
    prog: Program,
    params: Params,
    batches: objectives.Batch,
    step: Array,
    count: Array,
    forward: bool = False,
    poison: bool = False,
) -> tuple[Sums, Params]:
    """Returns the sums and the gradient of microbatches [M, b, ...] through the stages.

    Of two stacks, the one that reads goes forward first, with all microbatches, and back last.
    """
    given = _Given(prog, params, step, count, forward, poison)
    if ENCODER not in prog.stacks:
        loss, sums, grads = pipeline.run(_flow(given, STACK, batches))
        sums = {**sums, "loss": loss}
        return sums, {} if grads is None else _joined(prog, *grads[:2])
    reads = _flow(given, ENCODER, encoder_decoder.rows(batches))
    outs, kept = pipeline.forward(reads)
    source, vjp = jax.vjp(functools.partial(_looked_at, given), reads.rest, outs)
    loss, sums, grads = pipeline.run(_flow(given, STACK, batches, source))
    sums = stack.add([{**sums, "loss": loss}, {**kept["sums"], "loss": kept["loss"]}])
    if grads is None:
        return sums, {}
    d_rest, d_stack, d_source = grads
    more, d_outs = vjp(d_source)
    d_rest = jax.tree.map(jnp.add, d_rest, more)
    d_rest, d_reader = pipeline.backward(reads, kept, d_outs, d_rest)
    return sums, _joined(prog, d_rest, d_stack, d_reader)


@dataclasses.dataclass(frozen=True)
class _Given:
    """What stacks on stages have in common."""

    prog: Program
    params: Params
    step: Array
    count: Array
    forward: bool
    poison: bool

    def part(self, name: str, changes: Params) -> Any:
        """Returns a part of the model, with other values of parameters."""
        return self.prog.model({**self.params, **changes}).part(name)


def _flow(
    given: _Given, name: str, batches: objectives.Batch, source: Array | None = None
) -> pipeline.Flow:
    """Returns the way of microbatches [M, b, ...] through a stack."""
    prog, params = given.prog, given.params

    def embed(rest: Params, batch: objectives.Batch) -> Array:
        keys = row_keys(prog, batch, given.step)
        return given.part(name, rest).embed(batch["tokens"], batch["positions"], keys)

    def stage(chunk: Any, x: Array, batch: objectives.Batch, source: Any, ids: Any):
        part = given.part(name, chunk)
        tokens = Tokens(batch["positions"], batch["segments"])
        side = part.side(tokens, row_keys(prog, batch, given.step), prog.packed)
        if source is not None:
            side = encoder_decoder.looking(side, batch, source)
        x, aux = part.stage(x, side, prog.stacks[name], ids)
        loss, sums = objectives.layers(aux, batch)
        return x, jnp.float32(loss) / given.count, sums

    def head(rest: Params, x: Array, batch: objectives.Batch) -> tuple[Array, Sums]:
        model, objective = given.part(name, rest), prog.experiment.objective
        total, sums = objectives.score(
            objective, model, model.final(x), batch, graded=given.forward
        )
        return total / given.count, sums

    M = len(batches["tokens"]) if given.forward else None
    return pipeline.Flow(
        table=table(prog, M),
        model=pipeline.Model(embed, stage, head if name == STACK else None),
        rest={k: v for k, v in params.items() if k not in prog.stacks},
        stack=_placed(given, name),
        batches=batches,
        layers=prog.stacks[name].layers,
        source=source,
        poison=given.poison,
    )


def _looked_at(given: _Given, rest: Params, outs: Array) -> Array:
    """Returns what is looked at, [M, b, T, D], from what left the last stage."""
    return jax.vmap(given.part(ENCODER, rest).final)(outs)


def _placed(given: _Given, name: str) -> Params:
    """Returns what stages have of their own: the layers of a stack, leaves [P, v, l, ...], and a
    copy of the parameters that these have in common, leaves [P, v, ...]."""
    P_, v, _ = given.prog.stacks[name].layers.shape

    def rows(x: Array) -> Array:
        spec = jax.typeof(x).sharding.spec
        shape = (P_, v, len(x) // (P_ * v), *x.shape[1:])
        return x.reshape(shape, out_sharding=P(spec[0], None, None, *spec[1:]))

    def copies(x: Array) -> Array:
        over = stages.spec(None, *jax.typeof(x).sharding.spec)
        return reshard(jnp.broadcast_to(x[None, None], (P_, v, *x.shape)), over)

    own = {name: jax.tree.map(rows, given.params[name])}
    shared = given.part(name, {}).shared
    return own | {one: copies(given.params[one]) for one in shared}


def _joined(prog: Program, rest: Params, *own: Params) -> Params:
    """Returns the gradient of all parameters, by that of what stages do not have of their own and
    of what they do: the inverse of `_placed`."""

    def rows(x: Array) -> Array:
        spec = jax.typeof(x).sharding.spec
        shape = (math.prod(x.shape[:3]), *x.shape[3:])
        return x.reshape(shape, out_sharding=P(spec[0], *spec[3:]))

    grads = dict(rest)
    for part in own:
        for name, g in part.items():
            if name in prog.stacks:
                grads[name] = jax.tree.map(rows, g)
            else:
                grads[name] += g.sum((0, 1))  # an all-reduce over stages
    return grads
