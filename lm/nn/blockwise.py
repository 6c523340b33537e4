"""Attention block by block, exact, saving nothing of size T x T.

Online softmax forward (Milakov & Gimelshein 2018; Rabe & Staats 2021) and the recomputing backward
of FlashAttention-2 (Dao 2023, algorithm 2), in plain JAX: the fallback on every backend, and what a
ring over sequence shards is made of.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim; small letters
for one block. Everything here is local to a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

NEG = (
    -1e30
)  # a score that is masked; finite, so that a fully masked row gives 0 and no NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Who sees whom, and how scores are formed; static, the same for all rows."""

    scale: float  # scores are multiplied by this
    causal: bool = True  # a query sees only keys at its own position and before
    window: int | None = None  # and only the last `window` positions, itself included
    softcap: float | None = None  # scores become cap * tanh(score / cap)
    ordered: bool = True  # row i of queries and keys is the same token


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Positions and segments of a row of tokens; a token sees only its own segment."""

    positions: Any  # int [B, T]; Any, for a leaf of a tree may be any placeholder
    segments: Any  # int [B, T]


jax.tree_util.register_dataclass(Tokens, ["positions", "segments"], [])


def visible(mask: Mask, q: Tokens, kv: Tokens) -> Any:
    """Returns [B, T, S], true where the query may see the key."""
    seen = q.segments[:, :, None] == kv.segments[:, None, :]
    distance = q.positions[:, :, None] - kv.positions[:, None, :]
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= distance < mask.window
        if not mask.causal:
            seen &= distance > -mask.window
    return seen


def needed(mask: Mask, block: int, q: Tokens, kv: Tokens) -> Any:
    """Returns bool [T / block, S / block], false where no query of a block sees a key of the other.

    It goes by the least and the greatest position and segment of each block, so it may take a
    pair of blocks for needed that is not, never the other way round.
    """

    def ends(tokens: Tokens, axis: int) -> tuple[Tokens, Tokens]:
        parts = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, block), tokens)
        least, greatest = (
            jax.tree.map(lambda x, f=f: jnp.expand_dims(f(x, -1), axis), parts)
            for f in (jnp.min, jnp.max)
        )
        return least, greatest

    (q_low, q_high), (kv_low, kv_high) = ends(q, 2), ends(kv, 1)
    seen = q_low.segments <= kv_high.segments
    seen &= kv_low.segments <= q_high.segments
    nearest, farthest = (
        q_low.positions - kv_high.positions,
        q_high.positions - kv_low.positions,
    )
    if mask.causal:
        seen &= farthest >= 0
    if mask.window is not None:
        seen &= nearest < mask.window
        if not mask.causal:
            seen &= farthest > -mask.window
    seen = seen.any(0)
    if mask.ordered and mask.causal:  # positions restart within a row, rows do not
        ahead = np.subtract.outer(*map(np.arange, seen.shape))
        reach = mask.window - 1 if mask.window is not None else ahead.size * block
        seen &= (ahead >= 0) & (ahead * block < reach + block)
    return seen


def scores(
    mask: Mask, q_BTKGH: Array, k_BSKH: Array, seen_BTS: Array
) -> tuple[Array, Array | float]:
    """Returns masked fp32 scores [B, K, G, T, S] and the derivative of the soft cap in them."""
    s = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    s, slope = cap(mask.softcap, s * mask.scale)
    return jnp.where(seen_BTS[:, None, None], s, NEG), slope


def cap(limit: float | None, s: Array) -> tuple[Array, Array | float]:
    """Returns limit * tanh(s / limit) and its derivative by s; s and 1 where there is no limit."""
    if limit is None:
        return s, 1.0
    t = jnp.tanh(s / limit)
    return limit * t, 1 - t * t


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    mask: Mask,
    block: int,
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"]]:
    """Returns the attention output and the log-sum-exp of each query's scores (fp32).

    `block` must divide T and S. A query that sees no key gives 0 and a log-sum-exp of about -1e30.
    """
    return _fwd(mask, block, q_BTKGH, k_BSKH, v_BSKH, q_tokens, kv_tokens)[0]


def _rows(f: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `f`, for which a vmap around it is just more rows.

    Which blocks are needed is then asked once for all: a loop whose end is mapped would run, for
    each, to the last end of them all.
    """
    call = custom_vmap(f)

    @call.def_vmap
    def mapped(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        def fold(x: Any, is_mapped: bool) -> Any:
            x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = _rows(f)(*jax.tree.map(fold, args, tuple(batched)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return call


def _first(needed: Any) -> tuple[Any, Any]:
    """For each row of a bool matrix its true columns first, and how many there are."""
    return jnp.argsort(~needed, axis=1), needed.sum(1)


def _at(x: Array, i: Array, block: int, axis: int = 1) -> Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _tokens_at(tokens: Tokens, i: Array, block: int) -> Tokens:
    return Tokens(_at(tokens.positions, i, block), _at(tokens.segments, i, block))


def forward(
    mask: Mask, block: int, dtype: Any, q, k, v, q_tokens: Tokens, kv_tokens: Tokens
) -> tuple[Array, Array]:
    """Returns the output in `dtype` and the log-sum-exp in fp32; it has no gradient of its own."""
    run = _rows(functools.partial(_forward, mask, block, dtype))
    return run(q, k, v, q_tokens, kv_tokens)


def _forward(mask, block, dtype, q, k, v, q_tokens, kv_tokens):
    B, T, K, G, H = q.shape

    def row(_, one):
        i, blocks, count = one
        q_i, q_tok = _at(q, i, block), _tokens_at(q_tokens, i, block)

        def step(n, carry):
            j, (top, norm, out) = blocks[n], carry
            k_j, v_j = _at(k, j, block), _at(v, j, block)
            seen = visible(mask, q_tok, _tokens_at(kv_tokens, j, block))
            s, _ = scores(mask, q_i, k_j, seen)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.where(seen[:, None, None], jnp.exp(s - new_top[..., None]), 0)
            keep = jnp.exp(top - new_top)
            pv = jnp.einsum(
                "bkgts,bskh->bkgth",
                p.astype(v.dtype),
                v_j,
                preferred_element_type=jnp.float32,
            )
            return new_top, norm * keep + p.sum(-1), out * keep[..., None] + pv

        empty = jnp.full((B, K, G, block), NEG, jnp.float32)
        zero = jnp.zeros((B, K, G, block, H), jnp.float32)
        start = (empty, jnp.zeros_like(empty), zero)
        top, norm, out = lax.fori_loop(0, count, step, start)
        out = out / jnp.maximum(norm, 1e-30)[..., None]
        lse = jnp.where(norm > 0, top + jnp.log(jnp.maximum(norm, 1e-30)), NEG)
        return None, (out.astype(dtype).transpose(0, 3, 1, 2, 4), lse)

    order = _first(needed(mask, block, q_tokens, kv_tokens))
    _, (out, lse) = lax.scan(row, None, (jnp.arange(T // block), *order))
    out = jnp.moveaxis(out, 0, 1).reshape(B, T, K, G, H)
    return out, jnp.moveaxis(lse, 0, 3).reshape(B, K, G, T)


def _fwd(mask, block, q, k, v, q_tokens, kv_tokens):
    out, lse = forward(mask, block, q.dtype, q, k, v, q_tokens, kv_tokens)
    return (out, lse), (q, k, v, q_tokens, kv_tokens, out, lse)


def _bwd(mask, block, saved, cotangents):
    q, k, v, q_tokens, kv_tokens, out, lse = saved
    g, g_lse = cotangents
    delta = differences(out, g, g_lse)
    dq, dk, dv = backward(mask, block, q, k, v, q_tokens, kv_tokens, g, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def differences(out_BTKGH: Array, g_BTKGH: Array, g_lse_BKGT: Array) -> Array:
    """Returns delta [B, K, G, T], by which d s = p (d p - delta), from the results' cotangents.

    The log-sum-exp's own cotangent enters as -delta does.
    """
    out, g = out_BTKGH.astype(jnp.float32), g_BTKGH.astype(jnp.float32)
    return jnp.einsum("btkgh,btkgh->bkgt", g, out) - g_lse_BKGT


def backward(mask, block, q, k, v, q_tokens, kv_tokens, g, lse, delta):
    """Returns fp32 gradients of q, k, v from the output's cotangent, log-sum-exp and delta.

    The log-sum-exp may be that of more keys than these: then the results are these keys' share.
    """
    run = _rows(functools.partial(_backward, mask, block))
    return run(q, k, v, q_tokens, kv_tokens, g, lse, delta)


def _backward(mask, block, q, k, v, q_tokens, kv_tokens, g, lse, delta):
    S = k.shape[1]

    def column(dq, one):
        j, blocks, count = one
        k_j, v_j, kv_tok = (
            _at(k, j, block),
            _at(v, j, block),
            _tokens_at(kv_tokens, j, block),
        )

        def step(n, carry):
            i, (dq, dk_j, dv_j) = blocks[n], carry
            q_i, g_i = _at(q, i, block), _at(g, i, block)
            seen = visible(mask, _tokens_at(q_tokens, i, block), kv_tok)
            s, slope = scores(mask, q_i, k_j, seen)
            p = jnp.exp(s - _at(lse, i, block, 3)[..., None])
            p = jnp.where(seen[:, None, None], p, 0)
            dp = jnp.einsum(
                "btkgh,bskh->bkgts", g_i, v_j, preferred_element_type=jnp.float32
            )
            ds = p * (dp - _at(delta, i, block, 3)[..., None]) * slope * mask.scale
            ds, p = ds.astype(q.dtype), p.astype(g.dtype)
            exact = {"preferred_element_type": jnp.float32}
            dv_j += jnp.einsum("bkgts,btkgh->bskh", p, g_i, **exact)
            dk_j += jnp.einsum("bkgts,btkgh->bskh", ds, q_i, **exact)
            dq_i = _at(dq, i, block) + jnp.einsum("bkgts,bskh->btkgh", ds, k_j, **exact)
            return lax.dynamic_update_slice_in_dim(dq, dq_i, i * block, 1), dk_j, dv_j

        zero = jnp.zeros(k_j.shape, jnp.float32)
        dq, dk_j, dv_j = lax.fori_loop(0, count, step, (dq, zero, zero))
        return dq, (dk_j, dv_j)

    order = _first(needed(mask, block, q_tokens, kv_tokens).T)
    columns = (jnp.arange(S // block), *order)
    dq, (dk, dv) = lax.scan(column, jnp.zeros(q.shape, jnp.float32), columns)
    dk, dv = (jnp.moveaxis(d, 0, 1).reshape(k.shape) for d in (dk, dv))
    return dq, dk, dv


attention.defvjp(_fwd, _bwd)
