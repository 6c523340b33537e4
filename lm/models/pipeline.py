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
from collections.abc import Callable, Sequence
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
from lm.models.timetable import IDLE, Loop, Timetable

Sums = dict[str, Array]  # fp32 scalars that are reported
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in three parts, each of one microbatch; `rest` is what no stage has of its own."""

    embed: Callable[[Any, Batch], Array]  # (rest, batch) -> [b, T, D]
    # (a chunk's parameters, x, batch, source, ids of its layers) -> (x, loss, sums)
    stage: Callable[[Any, Array, Batch, Any, Array], tuple[Array, Array, Sums]]
    # -> (loss, sums); None: what leaves the last stage is all that is wanted
    head: Callable[[Any, Array, Batch], tuple[Array, Sums]] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """Microbatches on their way through the stages: what all ticks share."""

    table: Timetable  # what to do when
    model: Model
    rest: Any  # parameters
    stack: Any  # parameters, leaves [P, v, ...], P over the stages' mesh axis
    batches: Batch  # leaves [M, b, ...]
    layers: np.ndarray  # int [P, v, l]: ids of the layers; negative where there is none
    source: Array | None = None  # [M, b, S, D] that every stage looks at, or None
    poison: bool = False  # for tests: idle stages work on NaN, which no result may show


def run(flow: Flow) -> tuple[Array, Sums, Any]:
    """Returns the loss and the sums of all microbatches, and the gradient of (rest, stack, source).

    With a timetable of forwards alone the gradient is None. Gradients of parameters are fp32 sums,
    sharded as these; over a vmap of data replicas each replica has its own.
    """
    carry, trains = _start(flow), any(map(_goes_back, flow.table.loops))
    if trains:
        shape, dtype, spec = _stream(flow)
        many, over = (flow.table.head_slots, *shape), Spec(None, *spec)
        g_head = jnp.zeros(many, dtype, out_sharding=over)
        carry |= _back(flow, jax.tree.map(_like, flow.rest), g_head)
    carry = _loops(flow, carry, flow.table.loops)
    grads = None
    if trains:
        d_source = None if flow.source is None else carry["d_source"].sum(0)
        grads = carry["d_rest"], carry["d_stack"], d_source
    return carry["loss"], carry["sums"], grads


def forward(flow: Flow) -> tuple[Array, dict[str, Any]]:
    """Returns what leaves the last stage, [M, b, T, D], and the state that `backward` takes.

    For a model without a head, by a timetable in which no forward follows a backward.
    """
    ahead = [loop for loop in flow.table.loops if not _goes_back(loop)]
    carry = _loops(flow, _start(flow), ahead)
    return carry.pop("outs"), carry


def backward(
    flow: Flow, carry: dict[str, Any], g: Array, d_rest: Any
) -> tuple[Any, Any]:
    """Returns the gradients of (rest, stack).

    Args:
        flow: what `forward` was given.
        carry: its state.
        g: the gradient of what it returned.
        d_rest: what there is of the gradient of `rest`, to be added to.
    """
    back = [loop for loop in flow.table.loops if _goes_back(loop)]
    carry = _loops(flow, {**carry, **_back(flow, d_rest, g)}, back)
    return carry["d_rest"], carry["d_stack"]


def _goes_back(loop: Loop) -> bool:
    return any("B" in phase.kinds for phase in loop.phases)


def _loops(flow: Flow, carry: Any, chosen: Sequence[Loop]) -> Any:
    """Runs these loops of the table."""
    rows, first = _rows(flow.table, flow.layers), 0
    for loop in flow.table.loops:
        if any(loop is one for one in chosen):
            part = jax.tree.map(lambda a, i=first, n=loop.ticks: a[i : i + n], rows)
            carry = _loop(flow, loop, carry, part)
        first += loop.ticks
    return carry


def _loop(flow: Flow, loop: Loop, carry: Any, rows: Any) -> Any:
    def phases(carry: Any, rows: Any) -> Any:
        first = 0
        for phase in loop.phases:
            part = jax.tree.map(lambda a, i=first, n=phase.ticks: a[i : i + n], rows)
            tick = functools.partial(_tick, flow, phase.kinds)
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


def _stream(flow: Flow) -> tuple[tuple[int, ...], Any, Spec]:
    """Returns shape, dtype and spec of a microbatch's activations."""
    one = jax.eval_shape(flow.model.embed, flow.rest, _at(flow.batches, 0))
    return one.shape, one.dtype, stages.act()


def _start(flow: Flow) -> dict[str, Any]:
    """Returns the state before the first tick: nothing on its way, nothing kept."""
    P, batch = flow.table.stages, _at(flow.batches, 0)
    shape, dtype, spec = _stream(flow)

    def sums(rest: Any, stack: Any) -> Sums:
        ids = reshard(jnp.zeros(flow.layers.shape[::2], jnp.int32), stages.spec(None))
        chunk = jax.tree.map(lambda a: a[:, 0], stack)
        x = jnp.zeros((P, *shape), dtype, out_sharding=stages.spec(*spec))
        of_all = _of_stages(flow, ids[:, 0])
        _, _, found = _stages(flow)(chunk, x, *of_all, ids)
        found = jax.tree.map(lambda a: a.sum(0), found)
        if flow.model.head is None:
            return found
        x = flow.model.embed(rest, batch)
        return found | flow.model.head(rest, x, batch)[1]

    names = jax.eval_shape(sums, flow.rest, flow.stack)
    carry = {
        "y": jnp.zeros((P, *shape), dtype, out_sharding=stages.spec(*spec)),
        "loss": jnp.zeros((), jnp.float32, out_sharding=Spec()),
        "sums": jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=Spec()), names
        ),
    }
    if any(map(_goes_back, flow.table.loops)):
        kept, over = (P, flow.table.slots, *shape), stages.spec(None, *spec)
        carry["kept"] = jnp.zeros(kept, dtype, out_sharding=over)
    if flow.model.head is None:
        many = (flow.table.microbatches, *shape)
        carry["outs"] = jnp.full(
            many, _empty(flow), dtype, out_sharding=Spec(None, *spec)
        )
    return carry


def _back(flow: Flow, d_rest: Any, g_head: Array) -> dict[str, Any]:
    """Returns what backwards add to the state: gradients on their way, and their sums."""
    P = flow.table.stages
    shape, dtype, spec = _stream(flow)
    state = {
        "g": jnp.zeros((P, *shape), dtype, out_sharding=stages.spec(*spec)),
        "g_head": g_head,
        "d_rest": d_rest,
        "d_stack": jax.tree.map(_like, flow.stack),
    }
    if flow.source is not None:  # every stage puts its part for each microbatch in once
        many, over = (P, *flow.source.shape), stages.spec(None, *spec)
        state["d_source"] = jnp.full(
            many, _empty(flow), flow.source.dtype, out_sharding=over
        )
    return state


def _empty(flow: Flow) -> float:
    """Returns what lies where something is yet to be put."""
    return jnp.nan if flow.poison else 0.0


def _like(a: Array) -> Array:
    return jnp.zeros(a.shape, jnp.float32, out_sharding=jax.typeof(a).sharding.spec)


def _tick(flow: Flow, kinds: str, carry: Any, row: Any) -> tuple[Any, None]:
    # Columns of stages go where the stages are.
    row = {
        k: reshard(a, stages.spec(*[None] * (a.ndim - 1))) if a.ndim else a
        for k, a in row.items()
    }
    if "F" in kinds:
        carry = _forward(flow, carry, row)
    if "H" in kinds:
        carry = _head(flow, carry, row)
    if "B" in kinds:
        carry = _backward(flow, carry, row)
    return carry, None


def _forward(flow: Flow, carry: Any, row: Any) -> Any:
    """Every stage takes what its neighbour made (the first one a new microbatch), and runs."""
    new = flow.model.embed(flow.rest, _at(flow.batches, row["f_micro_first"]))
    came = stages.shift(carry["y"], 1)
    x = jnp.where(_column(row["f_first"], 3), new[None], came)
    if flow.poison:
        x = jnp.where(_column(row["f_on"], 3), x, jnp.nan)
    if "kept" in carry:
        kept = stages.put(carry["kept"], x, row["f_slot"], row["f_on"])
        carry = {**carry, "kept": kept}
    chunk = stages.chunks(flow.stack, row["f_round"])
    own = _of_stages(flow, row["f_micro"])
    y, loss, sums = _stages(flow)(chunk, x, *own, row["f_layers"])
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


def _head(flow: Flow, carry: Any, row: Any) -> Any:
    """Loss of the microbatch that leaves the last stage, and its gradient."""
    on, m = row["f_on_last"], row["f_micro_last"]
    batch = _at(flow.batches, m)
    x = stages.of_one(carry["y"], flow.table.stages - 1)
    head = flow.model.head
    if head is None:
        return {**carry, "outs": _put(carry["outs"], x, m, on)}
    x = jnp.where(on, x, 0)
    if "g" in carry:
        loss, vjp, sums = jax.vjp(
            lambda rest, x: head(rest, x, batch), flow.rest, x, has_aux=True
        )
        d_rest, g = vjp(on.astype(loss.dtype))
        kept = _put(carry["g_head"], g, m % flow.table.head_slots, on)
        carry = {**carry, "g_head": kept, "d_rest": _add(carry["d_rest"], d_rest)}
    else:
        loss, sums = head(flow.rest, x, batch)
    added = {k: carry["sums"][k] + jnp.where(on, a, 0) for k, a in sums.items()}
    return {
        **carry,
        "loss": carry["loss"] + jnp.where(on, loss, 0),
        "sums": {**carry["sums"], **added},
    }


def _backward(flow: Flow, carry: Any, row: Any) -> Any:
    """Every stage takes the gradient its neighbour made (the last one the head's), and runs."""
    slot = row["b_micro_last"] % flow.table.head_slots
    of_head = lax.dynamic_index_in_dim(carry["g_head"], slot, 0, keepdims=False)
    g = jnp.where(
        _column(row["b_last"], 3), of_head[None], stages.shift(carry["g"], -1)
    )
    x = stages.get(carry["kept"], row["b_slot"])
    if flow.poison:
        g = jnp.where(_column(row["b_on"], 3), g, jnp.nan)
    # An idle stage's gradient is zero. Its x is one that it kept, or zeros: finite.
    g = jnp.where(_column(row["b_on"], 3), g, 0)
    d_chunk, g, d_source = _stages(flow, backward=True)(
        stages.chunks(flow.stack, row["b_round"]), x, *_of_stages(flow, row["b_micro"]),
        row["b_layers"], g, row["b_on"].astype(jnp.float32),
    )  # fmt: skip
    if flow.source is not None:
        where = row["b_micro"], row["b_on"]
        carry = {**carry, "d_source": stages.put(carry["d_source"], d_source, *where)}
    d_stack = stages.add_chunks(carry["d_stack"], d_chunk, row["b_round"])
    g_first = jnp.where(row["b_on_first"], stages.of_one(g, 0), 0)
    batch = _at(flow.batches, row["b_micro_first"])
    _, vjp = jax.vjp(lambda rest: flow.model.embed(rest, batch), flow.rest)
    (d_rest,) = vjp(g_first)
    return {
        **carry,
        "g": g,
        "d_stack": d_stack,
        "d_rest": _add(carry["d_rest"], d_rest),
    }


def _stages(flow: Flow, backward: bool = False) -> Callable[..., Any]:
    """Returns the stage's function, or its gradient, over all stages at once."""

    def back(
        chunk: Any, x: Array, batch: Batch, source: Any, ids: Array, g: Array, on: Array
    ) -> Any:
        def run(chunk: Any, x: Array, source: Any) -> tuple[Array, Array]:
            return flow.model.stage(chunk, x, batch, source, ids)[:2]

        _, vjp = jax.vjp(run, chunk, x, source)
        return vjp((g, on))

    def each(*args: Any) -> Any:
        with sharding.mapped("layers"):
            return back(*args) if backward else flow.model.stage(*args)

    return jax.vmap(each)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False), tree
    )


def _put(slots: Array, x: Array, slot: Array, on: Array) -> Array:
    """Puts x into its slot of [K, b, T, D], or leaves that as it was."""
    old = lax.dynamic_index_in_dim(slots, slot, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(slots, jnp.where(on, x, old), slot, 0)


def _column(a: Array, dims: int) -> Array:
    return a.reshape(*a.shape, *[1] * dims)


def _of_stages(flow: Flow, m_P: Array) -> tuple[Batch, Array | None]:
    """Returns what each stage needs of its own microbatch: ids, and what it looks at."""

    def pick(a: Array) -> Array:
        rest = jax.typeof(a).sharding.spec[1:]
        return a.at[m_P].get(out_sharding=stages.spec(*rest))

    source = None if flow.source is None else stages.pick(flow.source, m_P)
    return jax.tree.map(pick, flow.batches), source
