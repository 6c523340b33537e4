"""What moves between a pipeline's stages, and what each keeps: manual regions, a line a collective.

Arrays have a leading axis of P stages, split over the stages' mesh axis; under a vmap of data
replicas the regions learn that axis too. K slots, v rounds, b rows, T length, D embed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array

from lm import sharding
from lm.nn import manual


def axis() -> str:
    """Returns the mesh axis of the stages."""
    (name,) = sharding.current().axes("layers")
    return name


def act() -> Spec:
    """Returns the spec of one microbatch's activations [b, T, D]."""
    return sharding.spec("batch", "residual", None)


def spec(*rest: Any) -> Spec:
    """Returns the spec of an array with a leading axis of stages."""
    return Spec(axis(), *rest)


def shift(a: Array, by: int) -> Array:
    """Sends every stage's [b, T, D] to the stage `by` further on; a ring."""
    name, P = axis(), a.shape[0]
    pairs = [(i, (i + by) % P) for i in range(P)]

    def send(a: Array) -> Array:
        return lax.ppermute(a, name, pairs)

    return manual.region(send, (spec(*act()),), spec(*act()))(a)


def of_one(a: Array, s: int) -> Array:
    """Returns one stage's [b, T, D] on all of them: a sum with nothing from the others."""
    name = axis()

    def masked(a: Array) -> Array:
        mine = lax.axis_index(name) == s
        return lax.psum(jnp.where(mine, a[0], 0), name)

    return manual.region(masked, (spec(*act()),), act())(a)


def put(slots: Array, x: Array, slot_P: Array, on_P: Array) -> Array:
    """Puts every stage's x into its slot of [P, K, b, T, D], where the stage is not idle."""

    def one(slots: Array, x: Array, slot: Array, on: Array) -> Array:
        old = lax.dynamic_index_in_dim(slots, slot[0], 1, keepdims=False)
        x = jnp.where(on[0], x, old)
        return lax.dynamic_update_index_in_dim(slots, x, slot[0], 1)

    many = spec(None, *act())
    ins = (many, spec(*act()), spec(), spec())
    return manual.region(one, ins, many)(slots, x, slot_P, on_P)


def get(slots: Array, slot_P: Array) -> Array:
    """Returns what lies in every stage's slot, [P, b, T, D]."""

    def one(slots: Array, slot: Array) -> Array:
        return lax.dynamic_index_in_dim(slots, slot[0], 1, keepdims=False)

    ins = (spec(None, *act()), spec())
    return manual.region(one, ins, spec(*act()))(slots, slot_P)


def pick(many: Array, m_P: Array) -> Array:
    """Returns of [M, b, T, D], which all stages have, what each one asks for: [P, b, T, D]."""

    def one(many: Array, m: Array) -> Array:
        return lax.dynamic_slice_in_dim(many, m[0], 1)

    ins = (Spec(None, *act()), spec())
    return manual.region(one, ins, spec(*act()))(many, m_P)


def chunks(stack: Any, round_P: Array) -> Any:
    """Returns every stage's chunk of its round: leaves [P, v, ...] → [P, ...]."""

    def local(a: Array, r: Array) -> Array:
        return lax.dynamic_index_in_dim(a, r[0], 1, keepdims=False)

    def one(a: Array) -> Array:
        if a.shape[1] == 1:
            return a[:, 0]
        own = jax.typeof(a).sharding.spec
        out = Spec(own[0], *own[2:])
        return manual.region(local, (own, spec()), out)(a, round_P)

    return jax.tree.map(one, stack)


def add_chunks(total: Any, part: Any, round_P: Array) -> Any:
    """Adds every stage's chunk, leaves [P, ...], to its round of the total, [P, v, ...]."""

    def local(a: Array, b: Array, r: Array) -> Array:
        old = lax.dynamic_index_in_dim(a, r[0], 1, keepdims=False)
        return lax.dynamic_update_index_in_dim(a, old + b.astype(a.dtype), r[0], 1)

    def one(a: Array, b: Array) -> Array:
        if a.shape[1] == 1:
            return a + b[:, None].astype(a.dtype)
        own = jax.typeof(a).sharding.spec
        ins = (own, Spec(own[0], *own[2:]), spec())
        return manual.region(local, ins, own)(a, b, round_P)

    return jax.tree.map(one, total, part)
