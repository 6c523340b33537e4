"""Tokens to experts and back: who sits where, and the exchange between devices.

A row's tokens stand in buffers of slots, one buffer for each expert; buffers go to the devices that
hold the experts and come back by all-to-alls. What stands where depends on the row alone, never on
the mesh or on other rows.

Shapes: B rows, T length, D embed, E experts, K choices of a token, C slots of an expert's buffer,
R rows of all buffers of an expert. Small letters are one device's share; n = e * c slots of a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lm import sharding
from lm.nn import manual
from lm.nn.blockwise import Tokens


class Plan(NamedTuple):
    """Where each choice of each token sits; the two maps are inverses of each other."""

    index_BN: (
        Any  # int32: which choice (token * K + k) a slot holds; T * K: it is empty
    )
    slot_BTK: (
        Any  # int32: the slot of a choice (expert * C + place); E * C: it has none
    )
    count_BE: Any  # int32: choices of an expert in the row, those without a slot too
    lost_B: Any  # int32: choices of the row without a slot


def plan(
    choice_BTK: Int[Array, "B T K"], tokens: Tokens, experts: int, room: int | None
) -> Plan:
    """Gives the choices of each row slots in the order of its tokens, until a buffer is full.

    Earlier tokens go first, so that no token depends on later ones. Where the length is split,
    each device has slots of its own for the choices that got one in the whole row.

    Args:
        choice_BTK: experts; `experts` for a token that goes nowhere.
        tokens: positions and segments: the order of a row's tokens, wherever they lie.
        experts: E.
        room: choices that an expert takes of a row; None: all.
    """
    rows, whole = sharding.spec("batch", "length"), sharding.spec("batch", None)
    split = sharding.current().axes("length")
    body = functools.partial(_plan, experts, room, split)
    outs = (
        sharding.spec("batch", "length"),
        sharding.spec("batch", "length", None),
        whole,
        sharding.spec("batch"),
    )
    three = sharding.spec("batch", "length", None)
    found = manual.region(body, (three, rows, rows), outs)(
        choice_BTK, tokens.positions, tokens.segments
    )
    return Plan(*found)


def _plan(experts: int, room: int | None, split: tuple[str, ...], choice, at, segment):
    b, t, K = choice.shape
    c = t if room is None else min(room, t)
    count_be = _count(experts, choice.reshape(b, -1))
    if split:
        count_be = lax.psum(count_be, split)
        if room is not None:
            choice = _admit(experts, room, split, choice, at, segment)
    flat = choice.reshape(b, t * K)
    by, rank = jax.vmap(functools.partial(_ranks, experts))(flat)
    seated = (flat < experts) & (rank < c)
    slot = jnp.where(seated, flat * c + rank, experts * c)
    seated_b = seated.sum(1)
    if split:
        seated_b = lax.psum(seated_b, split)

    # Slot (e, i) holds the i-th of the choices that sorting put behind those of experts before e.
    here_be = _count(experts, flat)
    first_be = jnp.cumsum(here_be, 1) - here_be
    place = first_be[:, :, None] + jnp.arange(c)[None, None]
    filled = jnp.arange(c)[None, None] < here_be[:, :, None]
    place = jnp.where(filled, place, t * K).reshape(b, -1)
    index = jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=t * K))(by, place)
    return index, slot.reshape(b, t, K), count_be, count_be.sum(1) - seated_b


def _admit(experts: int, room: int, split: tuple[str, ...], choice, at, segment):
    """Sends choices nowhere that are beyond `room` in the whole row; a few integers a token."""
    b, t, K = choice.shape
    gather = functools.partial(lax.all_gather, axis_name=split, axis=1, tiled=True)
    order = jnp.lexsort((gather(at), gather(segment)))
    every = jax.vmap(lambda a, i: a[i])(gather(choice), order).reshape(b, -1)
    _, rank = jax.vmap(functools.partial(_ranks, experts))(every)
    rank = rank.reshape(b, -1, K)
    rank = jax.vmap(lambda r, i: jnp.zeros_like(r).at[i].set(r))(rank, order)
    mine = lax.dynamic_slice_in_dim(rank, lax.axis_index(split) * t, t, 1)
    return jnp.where(mine < room, choice, experts)


def _ranks(experts: int, flat: Array) -> tuple[Array, Array]:
    """Returns the choices sorted by expert (stable), and each one's place among its expert's."""
    by = jnp.argsort(flat, stable=True)
    ends = jnp.searchsorted(flat[by], jnp.arange(experts + 1))
    rank = jnp.arange(flat.size) - ends[flat[by]]
    return by, jnp.zeros_like(flat).at[by].set(rank)


def _count(experts: int, flat_bn: Array) -> Array:
    zero = jnp.zeros((flat_bn.shape[0], experts), jnp.int32)
    return jax.vmap(lambda a, i: a.at[i].add(1, mode="drop"))(zero, flat_bn)


def send(
    x_BTD: Float[Array, "B T D"], where: Plan, experts: int
) -> Float[Array, "E R D"]:
    """Returns the experts' buffers, each on the devices that hold the expert; empty slots are 0."""
    over = sharding.current().axes("expert")

    def body(x, index, slot):
        x_bnd = spread(x, index, slot)
        x_becd = x_bnd.reshape(x.shape[0], experts, -1, x.shape[-1])
        if over:
            x_becd = lax.all_to_all(x_becd, over, 1, 0, tiled=True)
        e, D = x_becd.shape[1], x.shape[-1]
        return (jnp.moveaxis(x_becd, 1, 0).reshape(e, -1, D),)

    ins = (_x(), sharding.spec("batch", "length"), _x())
    out = sharding.spec("expert", "dispatched", None)
    run = manual.manual(body, ins, (out,), "dispatch")
    return run(x_BTD, where.index_BN, where.slot_BTK)[0]


def receive(
    y_ERD: Float[Array, "E R D"], where: Plan, gate_BTK: Float[Array, "B T K"]
) -> Float[Array, "B T D"]:
    """Returns each token's sum of what its experts made of it, times its gates."""
    layout = sharding.current()
    over, parts = layout.axes("expert"), layout.size("expert")

    def body(y, index, slot, gate):
        (b, t, K), D = slot.shape, y.shape[-1]
        y_becd = jnp.moveaxis(y.reshape(y.shape[0], b * parts, -1, D), 0, 1)
        if over:
            y_becd = lax.all_to_all(y_becd, over, 0, 1, tiled=True)
        y_btkd = collect(y_becd.reshape(b, -1, D), slot, index).reshape(b, t, K, D)
        out = jnp.einsum("btkd,btk->btd", y_btkd.astype(gate.dtype), gate)
        return (out.astype(y.dtype),)

    rows = sharding.spec("batch", "length")
    ins = (sharding.spec("expert", "dispatched", None), rows, _x(), _x())
    run = manual.manual(body, ins, (_x(),), "dispatch")
    return run(y_ERD, where.index_BN, where.slot_BTK, gate_BTK)[0]


class Groups(NamedTuple):
    """Experts in groups, of which a token may only use some."""

    count: int
    keep: int  # groups that a token may use
    best: int  # a group is as good as the sum of so many of its best experts


def choose(
    score_BTE: Float[Array, "B T E"], choices: int, groups: Groups | None = None
) -> Int[Array, "B T K"]:
    """Returns the experts with the highest scores; of equal ones, the first.

    In a region, as XLA gathers the rows of a sharded top-k otherwise.
    """

    def body(score):
        if groups is not None:
            parts = score.reshape(*score.shape[:-1], groups.count, -1)
            of_group = lax.top_k(parts, groups.best)[0].sum(-1)
            kept = lax.top_k(of_group, groups.keep)[1]
            each = lax.broadcasted_iota(kept.dtype, (1, 1, 1, groups.count), 3)
            there = (kept[..., None] == each).any(-2)
            parts = jnp.where(there[..., None], parts, -jnp.inf)
            score = parts.reshape(score.shape)
        return lax.top_k(score, choices)[1]

    return manual.region(body, (_x(),), _x())(score_BTE)


def chosen(
    score_BTE: Float[Array, "B T E"], choice_BTK: Int[Array, "B T K"]
) -> Float[Array, "B T K"]:
    """Returns the scores of the chosen experts."""

    def body(score, choice):
        return (jnp.take_along_axis(score, choice, -1),)

    return manual.manual(body, (_x(), _x()), (_x(),), "dispatch")(
        score_BTE, choice_BTK
    )[0]


def _x():
    return sharding.spec("batch", "length", None)


def _rows(x_bmd: Array, index_bn: Array) -> Array:
    """Returns x's entries at the index, 0 where it is beyond the last."""
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
    return jax.vmap(take)(x_bmd, index_bn)


# A slot holds one choice and a choice has one slot, so that both directions of both maps are
# lookups; left to autodiff, backward they would be scatters, which no backend runs well.


@jax.custom_vjp
def spread(x_btd: Array, index_bn: Array, slot_btk: Array) -> Any:
    return _rows(x_btd, index_bn // slot_btk.shape[-1])


def _spread_back(slot, g):
    g = _rows(g, slot.reshape(slot.shape[0], -1))
    return g.reshape(*slot.shape, -1).sum(2), None, None


spread.defvjp(lambda x, index, slot: (spread(x, index, slot), slot), _spread_back)


@jax.custom_vjp
def collect(y_bnd: Array, slot_btk: Array, index_bn: Array) -> Any:
    return _rows(y_bnd, slot_btk.reshape(slot_btk.shape[0], -1))


def _collect_back(index, g):
    return _rows(g, index), None, None


collect.defvjp(lambda y, slot, index: (collect(y, slot, index), index), _collect_back)
