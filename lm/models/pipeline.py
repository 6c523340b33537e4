"""Runs a model's stages by a timetable: all stages in every tick, vmapped, gradients by hand.

No branch depends on the stage, so no collective stands inside a conditional: a stage that is idle
computes on what lies there, and a select drops it. Only ids are kept for every microbatch; it is
embedded in the tick in which it enters, and its embedding's gradient added in the tick in which
its backward leaves the first stage. A stage keeps the input of a chunk from its forward to its
backward, which computes the chunk again. The head is the work of all stages (the vocabulary is
split over them too) and gets the last stage's output by a masked sum over them.

Shapes: P stages, v rounds, l layers of a chunk, M microbatches, b rows, T length, D embed, K slots.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as Spec
from jax.sharding import reshard
from jaxtyping import Array

from lm import sharding
from lm.models import stages
from lm.models.timetable import IDLE, Timetable

Sums = dict[str, Array]  # fp32 scalars that are reported
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in three parts, each of one microbatch; `rest` is all but the stack's parameters."""

    embed: Callable[[Any, Batch], Array]  # (rest, batch) -> [b, T, D]
    # (a chunk's parameters, x, batch, ids of its layers) -> (x, loss, sums)
    stage: Callable[[Any, Array, Batch, Array], tuple[Array, Array, Sums]]
    head: Callable[[Any, Array, Batch], tuple[Array, Sums]]  # -> (loss, sums)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all ticks share."""

    table: Timetable
    model: Model
    rest: Any
    stack: Any  # leaves [P, v, l, ...]
    batches: Batch  # leaves [M, b, ...]
    poison: bool  # what idle stages are given is NaN


def run(
    table: Timetable,
    model: Model,
    rest: Any,
    stack: Any,
    batches: Batch,
    layers: np.ndarray,
    poison: bool = False,
) -> tuple[Array, Sums, Any]:
    """Returns the loss and the sums of all microbatches, and the gradient of (rest, stack).

    With a timetable of forwards alone the gradient is None. Gradients are fp32 sums, sharded as
    the parameters; over a vmap of data replicas each replica has its own.

    Args:
        table: what to do when.
        model: the functions of the parts.
        rest: parameters outside the stack.
        stack: parameters of the stack, leaves [P, v, l, ...], P over the stages' mesh axis.
        batches: leaves [M, b, ...].
        layers: int [P, v, l]: ids of the layers; negative where there is none.
        poison: for tests: idle stages work on NaN, which no result may show.
    """
    shared = _Run(table, model, rest, stack, batches, poison)
    rows = _rows(table, layers)
    carry = _start(shared, layers)
    first = 0
    for loop in table.loops:
        part = jax.tree.map(lambda a, i=first, n=loop.ticks: a[i : i + n], rows)
        carry = _loop(shared, loop, carry, part)
        first += loop.ticks
    grads = (carry["d_rest"], carry["d_stack"]) if "g" in carry else None
    return carry["loss"], carry["sums"], grads


def _loop(shared: _Run, loop: Any, carry: Any, rows: Any) -> Any:
    def phases(carry: Any, rows: Any) -> Any:
        first = 0
        for phase in loop.phases:
            part = jax.tree.map(lambda a, i=first, n=phase.ticks: a[i : i + n], rows)
            tick = functools.partial(_tick, shared, phase.kinds)
            carry, _ = lax.scan(tick, carry, part)
            first += phase.ticks
        return carry, None

    if loop.times == 1:
        return phases(carry, rows)[0]
    rows = jax.tree.map(lambda a: a.reshape(loop.times, -1, *a.shape[1:]), rows)
    return lax.scan(phases, carry, rows)[0]


def _rows(table: Timetable, layers: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what a tick reads of the table: [ticks, P, ...], and [ticks] for the model's ends."""
    P, v = table.stages, table.rounds
    stage = np.arange(P)
    rows = {}
    for name, jobs, slot in (
        ("f", table.forward, table.forward_slot),
        ("b", table.backward, table.backward_slot),
    ):
        on = jobs != IDLE
        m, r = np.divmod(np.maximum(jobs, 0), v)
        rows |= {
            f"{name}_on": on,
            f"{name}_micro": m,
            f"{name}_round": r,
            f"{name}_slot": slot,
            f"{name}_layers": layers[stage, r],
            f"{name}_first": (stage == 0) & (r == 0),
            f"{name}_last": (stage == P - 1) & (r == v - 1),
            f"{name}_micro_first": m[:, 0],
            f"{name}_on_first": on[:, 0] & (r[:, 0] == 0),
            f"{name}_micro_last": m[:, -1],
            f"{name}_on_last": on[:, -1] & (r[:, -1] == v - 1),
        }
    return {k: a if a.dtype == bool else a.astype(np.int32) for k, a in rows.items()}


def _start(shared: _Run, layers: np.ndarray) -> dict[str, Any]:
    """Returns the state before the first tick: nothing on its way, nothing kept."""
    table, P = shared.table, shared.table.stages
    batch = _at(shared.batches, 0)
    one = jax.eval_shape(shared.model.embed, shared.rest, batch)

    def zeros(*lead: int) -> Array:
        spec = stages.spec(*[None] * (len(lead) - 1), *stages.act())
        return jnp.zeros((*lead, *one.shape), one.dtype, out_sharding=spec)

    def sums(rest: Any, stack: Any) -> Sums:
        ids = reshard(jnp.zeros(layers.shape[::2], jnp.int32), stages.spec(None))
        chunk = jax.tree.map(lambda a: a[:, 0], stack)
        _, _, of_stage = _stages(shared)(
            chunk, zeros(P), _of_stages(shared, ids[:, 0]), ids
        )
        of_stage = jax.tree.map(lambda a: a.sum(0), of_stage)
        return (
            of_stage
            | shared.model.head(rest, shared.model.embed(rest, batch), batch)[1]
        )

    names = jax.eval_shape(sums, shared.rest, shared.stack)
    carry = {
        "y": zeros(P),
        "loss": jnp.zeros((), jnp.float32, out_sharding=Spec()),
        "sums": jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=Spec()), names
        ),
    }
    if (table.backward == IDLE).all():
        return carry

    def like(a: Array) -> Array:
        return jnp.zeros(a.shape, jnp.float32, out_sharding=jax.typeof(a).sharding.spec)

    shape = (table.head_slots, *one.shape)
    return carry | {
        "kept": zeros(P, table.slots),
        "g": zeros(P),
        "g_head": jnp.zeros(shape, one.dtype, out_sharding=Spec(None, *stages.act())),
        "d_rest": jax.tree.map(like, shared.rest),
        "d_stack": jax.tree.map(like, shared.stack),
    }


def _tick(shared: _Run, kinds: str, carry: Any, row: Any) -> tuple[Any, None]:
    # Columns of stages go where the stages are.
    row = {
        k: reshard(a, stages.spec(*[None] * (a.ndim - 1))) if a.ndim else a
        for k, a in row.items()
    }
    if "F" in kinds:
        carry = _forward(shared, carry, row)
    if "H" in kinds:
        carry = _head(shared, carry, row)
    if "B" in kinds:
        carry = _backward(shared, carry, row)
    return carry, None


def _forward(shared: _Run, carry: Any, row: Any) -> Any:
    """Every stage takes what its neighbour made (the first one a new microbatch), and runs."""
    new = shared.model.embed(shared.rest, _at(shared.batches, row["f_micro_first"]))
    came = stages.shift(carry["y"], 1)
    x = jnp.where(_column(row["f_first"], 3), new[None], came)
    if shared.poison:
        x = jnp.where(_column(row["f_on"], 3), x, jnp.nan)
    if "kept" in carry:
        kept = stages.put(carry["kept"], x, row["f_slot"], row["f_on"])
        carry = {**carry, "kept": kept}
    chunk = stages.chunks(shared.stack, row["f_round"])
    batch = _of_stages(shared, row["f_micro"])
    y, loss, sums = _stages(shared)(chunk, x, batch, row["f_layers"])
    loss, sums = jax.tree.map(
        lambda a: jnp.where(_column(row["f_on"], a.ndim - 1), a, 0).sum(0), (loss, sums)
    )
    added = {k: carry["sums"][k] + a for k, a in sums.items()}
    return {
        **carry,
        "y": y,
        "loss": carry["loss"] + loss,
        "sums": {**carry["sums"], **added},
    }


def _head(shared: _Run, carry: Any, row: Any) -> Any:
    """Loss of the microbatch that leaves the last stage, and its gradient."""
    on, m = row["f_on_last"], row["f_micro_last"]
    batch = _at(shared.batches, m)
    x = stages.of_one(carry["y"], shared.table.stages - 1)
    x = jnp.where(on, x, 0)
    if "g" in carry:
        loss, vjp, sums = jax.vjp(
            lambda rest, x: shared.model.head(rest, x, batch),
            shared.rest, x, has_aux=True,
        )  # fmt: skip
        d_rest, g = vjp(on.astype(loss.dtype))
        slot = m % shared.table.head_slots
        kept = lax.dynamic_update_index_in_dim(carry["g_head"], g, slot, 0)
        if shared.table.head_slots > 1:
            kept = jnp.where(on, kept, carry["g_head"])
        carry = {**carry, "g_head": kept, "d_rest": _add(carry["d_rest"], d_rest)}
    else:
        loss, sums = shared.model.head(shared.rest, x, batch)
    added = {k: carry["sums"][k] + jnp.where(on, a, 0) for k, a in sums.items()}
    return {
        **carry,
        "loss": carry["loss"] + jnp.where(on, loss, 0),
        "sums": {**carry["sums"], **added},
    }


def _backward(shared: _Run, carry: Any, row: Any) -> Any:
    """Every stage takes the gradient its neighbour made (the last one the head's), and runs."""
    slot = row["b_micro_last"] % shared.table.head_slots
    of_head = lax.dynamic_index_in_dim(carry["g_head"], slot, 0, keepdims=False)
    g = jnp.where(
        _column(row["b_last"], 3), of_head[None], stages.shift(carry["g"], -1)
    )
    x = stages.get(carry["kept"], row["b_slot"])
    if shared.poison:
        g = jnp.where(_column(row["b_on"], 3), g, jnp.nan)
    # An idle stage's gradient is zero. Its x is one that it kept, or zeros: finite.
    g = jnp.where(_column(row["b_on"], 3), g, 0)
    d_chunk, g = _stages(shared, backward=True)(
        stages.chunks(shared.stack, row["b_round"]), x, _of_stages(shared, row["b_micro"]),
        row["b_layers"], g, row["b_on"].astype(jnp.float32),
    )  # fmt: skip
    d_stack = stages.add_chunks(carry["d_stack"], d_chunk, row["b_round"])
    g_first = jnp.where(row["b_on_first"], stages.of_one(g, 0), 0)
    batch = _at(shared.batches, row["b_micro_first"])
    _, vjp = jax.vjp(lambda rest: shared.model.embed(rest, batch), shared.rest)
    (d_rest,) = vjp(g_first)
    return {
        **carry,
        "g": g,
        "d_stack": d_stack,
        "d_rest": _add(carry["d_rest"], d_rest),
    }


def _stages(shared: _Run, backward: bool = False) -> Callable[..., Any]:
    """Returns the stage's function, or its gradient, over all stages at once."""

    def back(
        chunk: Any, x: Array, batch: Batch, ids: Array, g: Array, on: Array
    ) -> Any:
        run = shared.model.stage
        _, vjp = jax.vjp(lambda c, x: run(c, x, batch, ids)[:2], chunk, x)
        return vjp((g, on))

    def each(*args: Any) -> Any:
        with sharding.mapped("layers"):
            return back(*args) if backward else shared.model.stage(*args)

    return jax.vmap(each)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree
    )


def _column(a: Array, dims: int) -> Array:
    return a.reshape(*a.shape, *[1] * dims)


def _of_stages(shared: _Run, m_P: Array) -> Batch:
    """Returns what each stage needs of its own microbatch's ids."""

    def pick(a: Array) -> Array:
        rest = jax.typeof(a).sharding.spec[1:]
        return a.at[m_P].get(out_sharding=stages.spec(*rest))

    return jax.tree.map(pick, shared.batches)
