"""Tokens to experts and back without slots: rows sorted by expert, groups of any size.

For accelerators, whose ragged all-to-all sends each device just the rows that are for it. A buffer
still has room for the worst case, every token here, but only the rows in it cost time.

Shapes: B rows, T length, D embed, E experts, K choices of a token, X devices that share the
experts, M = b t K choices of a device, R room for the rows a device may get. Small letters are one
device's share.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.nn import dispatch, manual


class Plan(NamedTuple):
    """How a device's choices are sorted, and how many go where."""

    by_BM: Any  # int32: which choice (token * K + k, of the device) stands at a place
    place_BTK: Any  # int32: the place of a choice; M for one of no expert
    count: Any  # int32[B, T, X, E], a device's: choices of each device of its group, by expert


def fits() -> bool:
    """Returns whether the platform has what this needs; XLA's CPU backend has not."""
    return sharding.current().platform != "cpu"


def plan(choice_BTK: Int[Array, "B T K"], experts: int) -> Plan:
    """Sorts each device's choices by expert, those of no expert (`experts`) last."""
    over = sharding.current().axes("expert")

    def body(choice):
        flat = choice.reshape(-1)
        by = jnp.argsort(flat, stable=True)
        place = jnp.zeros_like(flat).at[by].set(jnp.arange(flat.size))
        place = jnp.where(flat < experts, place, flat.size)
        count = jnp.zeros((1, experts), jnp.int32).at[0, flat].add(1, mode="drop")
        if over:
            count = lax.all_gather(count, over, axis=0, tiled=True)
        by = by.reshape(choice.shape[0], -1)
        return by, place.reshape(choice.shape), count[None, None]

    three, four = (_spec(n) for n in (3, 4))
    outs = (sharding.spec("batch", "length"), three, four)
    return Plan(*manual.region(body, (three,), outs)(choice_BTK))


def send(x_BTD: Float[Array, "B T D"], where: Plan, top: int) -> Array:
    """Returns the rows of each device's experts, sorted by expert: [B', T', R, D], one a device.

    Args:
        x_BTD: tokens.
        where: from `plan`.
        top: at most so many experts of one device are chosen by one token.
    """

    def body(x, by, place, count):
        X, D = count.shape[2], x.shape[-1]
        M, K = by.size, place.shape[-1]
        rows = dispatch.spread(
            x.reshape(1, -1, D), by.reshape(1, M), place.reshape(1, -1, K)
        )[0]
        if X == 1:
            return (rows[None, None],)
        rows = _exchange(rows, _sizes(count[0, 0]), X * (M // K) * min(top, K))
        order, back = _order(count[0, 0], len(rows))
        return (dispatch.spread(rows[None], order[None], back[None, :, None])[None],)

    ins = (_spec(3), sharding.spec("batch", "length"), _spec(3), _spec(4))
    return manual.manual(body, ins, (_spec(4),), "dispatch")(x_BTD, *where)[0]


def receive(
    y: Array, where: Plan, gate_BTK: Float[Array, "B T K"]
) -> Float[Array, "B T D"]:
    """Returns each token's sum of what its experts made of it, times its gates."""

    def body(y, by, place, count, gate):
        y, D = y[0, 0], y.shape[-1]
        b, t, K = place.shape
        if count.shape[2] > 1:
            order, back = _order(count[0, 0], len(y))
            y = dispatch.spread(y[None], back[None], order[None, :, None])[0]
            y = _exchange(y, _sizes(count[0, 0]).T, by.size)
        y = dispatch.collect(y[None], place.reshape(1, -1, K), by.reshape(1, -1))
        y = y.reshape(b, t, K, D).astype(gate.dtype)
        return (jnp.einsum("btkd,btk->btd", y, gate).astype(y_dtype),)

    y_dtype = y.dtype
    ins = (_spec(4), sharding.spec("batch", "length"), _spec(3), _spec(4), _spec(3))
    return manual.manual(body, ins, (_spec(3),), "dispatch")(y, *where, gate_BTK)[0]


def experts(
    x: Array,
    where: Plan,
    weights: Sequence[Array],
    act: Any,
    biases: Sequence[Array] = (),
) -> Array:
    """Returns the experts' layer on rows sorted by expert.

    A weight enters the region as a copy for each device that holds it, so that the transpose of
    the copy is the sum of their gradients; so do the rows over the devices that share the width.

    Args:
        x: rows, from `send`.
        where: from `plan`.
        weights: gate (if gated) and up [E, D, F], down [E, F, D], gathered for use.
        act: what the hidden layer's first products go through.
        biases: [E, F], added to the first products; none, or one for each.
    """
    layout = sharding.current()
    over, wide = layout.axes("expert"), layout.size("mlp")
    copies = layout.size("dispatched")

    def body(x, count, *given):
        sizes = _mine(count[0, 0], over).sum(0)
        given = [w[0] for w in given]
        *first, down = given[: len(weights)]
        h = [grouped(x[0, 0, 0], w, sizes) for w in first]
        for i, b in enumerate(
            given[len(weights) :]
        ):  # rows beyond the groups come to 0 below
            h[i] = h[i] + jnp.repeat(b, sizes, axis=0, total_repeat_length=len(h[i]))
        hidden = act(*h)
        return (grouped(hidden, down, sizes)[None, None, None],)

    rows = sharding.spec("mlp", "batch", "length", None, None)
    up = sharding.spec("dispatched", "expert", None, "mlp")
    down = sharding.spec("dispatched", "expert", "mlp", None)
    shift = sharding.spec("dispatched", "expert", "mlp")
    specs = [up] * (len(weights) - 1) + [down] + [shift] * len(biases)
    every = [
        jnp.broadcast_to(w[None], (copies, *w.shape), out_sharding=s)
        for w, s in zip([*weights, *biases], specs, strict=True)
    ]
    x = jnp.broadcast_to(x[None], (wide, *x.shape), out_sharding=rows)
    run = manual.manual(body, (rows, _spec(4), *specs), (rows,), "experts")
    return run(x, where.count, *every)[0].sum(0)  # reduce over tensor


@jax.custom_vjp
def grouped(x_rd: Array, w_edf: Array, sizes_e: Array) -> Any:
    """Returns each row times the matrix of its group; rows beyond the groups give 0."""
    return _forward(x_rd, w_edf, sizes_e)


# `ragged_dot` can't be mapped where only some operands are: mapped shares are taken one by one.


@sequential_vmap
def _forward(x, w, sizes):
    return lax.ragged_dot(x, w, sizes, out_sharding=_whole(2))


@sequential_vmap
def _backward(x, w, sizes, g):
    contract = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    dw = lax.ragged_dot_general(x, g, sizes, contract, out_sharding=_whole(3))
    dx = lax.ragged_dot(g, w.mT, sizes, out_sharding=_whole(2))
    return dx, dw.astype(w.dtype)


def _whole(rank: int) -> P | None:
    """A region under a vmap is first traced beside it, with the mapped axis not yet manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return P(*[None] * rank) if AxisType.Explicit in mesh.axis_types else None


grouped.defvjp(
    lambda x, w, sizes: (_forward(x, w, sizes), (x, w, sizes)),
    lambda saved, g: (*_backward(*saved, g), None),
)


def _exchange(rows: Array, sizes_XX: Array, room: int) -> Array:
    """Returns what the devices of this one's group have for it, in their order.

    Args:
        rows: [m, D], those for the first device first.
        sizes_XX: rows from each device to each.
        room: rows of the result; 0 where there is nothing.
    """
    layout = sharding.current()
    over = layout.axes("expert")
    me = lax.axis_index(over)
    start = jnp.cumsum(sizes_XX, 1) - sizes_XX  # in the sender's rows
    before = jnp.cumsum(sizes_XX, 0) - sizes_XX  # in the receiver's
    if layout.platform != "cpu":
        out = jnp.zeros((room, rows.shape[-1]), rows.dtype)
        where = (start[me], sizes_XX[me], before[me], sizes_XX[:, me])
        where = (a.astype(jnp.int32) for a in where)
        return lax.ragged_all_to_all(rows, out, *where, axis_name=over)
    place = jnp.arange(room)
    ends = before[:, me] + sizes_XX[:, me]
    sender = jnp.searchsorted(ends, place, side="right")
    at = sender * len(rows) + place + (start - before)[:, me][sender]
    at = jnp.where(sender < len(ends), at, math.prod(sizes_XX.shape) * len(rows))
    every = lax.all_gather(rows, over, axis=0, tiled=True)
    return every.at[at].get(mode="fill", fill_value=0)


def _sizes(count_XE: Array) -> Array:
    """Returns the rows from each device to each."""
    X = len(count_XE)
    return count_XE.reshape(X, X, -1).sum(-1)


def _mine(count_XE: Array, over: tuple[str, ...]) -> Array:
    """Returns the counts of this device's experts."""
    share = count_XE.shape[1] // len(count_XE)
    first = lax.axis_index(over) * share if over else 0
    return lax.dynamic_slice_in_dim(count_XE, first, share, 1)


def _order(count_XE: Array, room: int) -> tuple[Array, Array]:
    """Returns the order that sorts the rows received, by sender and expert, by expert; and back."""
    mine_Xe = _mine(count_XE, sharding.current().axes("expert"))
    e = mine_Xe.shape[1]
    ends = jnp.cumsum(mine_Xe.reshape(-1))
    place = jnp.arange(room)
    expert = jnp.searchsorted(ends, place, side="right") % e
    order = jnp.argsort(jnp.where(place < ends[-1], expert, e), stable=True)
    return order, jnp.zeros_like(order).at[order].set(place)


def _spec(rank: int) -> Any:
    return sharding.spec("batch", "length", *[None] * (rank - 2))
