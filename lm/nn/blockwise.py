"""Attention block by block, exact, saving nothing of size T x T.

Online softmax forward (Milakov & Gimelshein 2018; Rabe & Staats 2021) and the recomputing backward
of FlashAttention-2 (Dao 2023, algorithm 2), in plain JAX: the fallback on every backend, and what a
ring over sequence shards is made of.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim; small letters
for one block. Everything here is local to a device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
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
    ordered: bool = (
        True  # row i of queries and keys is the same token: later blocks are skipped
    )


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
    return _forward(mask, block, q_BTKGH, k_BSKH, v_BSKH, q_tokens, kv_tokens)


def _span(
    mask: Mask, i: Array, block: int, count: int, *, keys: bool
) -> tuple[Array, Array]:
    """The key blocks that query block i needs, or the query blocks that key block i does."""
    lo, hi = jnp.zeros_like(i), jnp.full_like(i, count)
    if mask.ordered and mask.causal:
        lo, hi = (lo, i + 1) if keys else (i, hi)
        if mask.window is not None:
            reach = (mask.window - 1 + block - 1) // block
            if keys:
                lo = jnp.maximum(lo, i - reach)
            else:
                hi = jnp.minimum(hi, i + reach + 1)
    return lo, hi


def _at(x: Array, i: Array, block: int, axis: int = 1) -> Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _tokens_at(tokens: Tokens, i: Array, block: int) -> Tokens:
    return Tokens(_at(tokens.positions, i, block), _at(tokens.segments, i, block))


def _forward(mask, block, q, k, v, q_tokens, kv_tokens):
    B, T, K, G, H = q.shape
    S = k.shape[1]

    def row(_, i):
        q_i, q_tok = _at(q, i, block), _tokens_at(q_tokens, i, block)

        def step(j, carry):
            top, norm, out = carry
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
        lo, hi = _span(mask, i, block, S // block, keys=True)
        top, norm, out = lax.fori_loop(
            lo, hi, step, (empty, jnp.zeros_like(empty), zero)
        )
        out = out / jnp.maximum(norm, 1e-30)[..., None]
        lse = jnp.where(norm > 0, top + jnp.log(jnp.maximum(norm, 1e-30)), NEG)
        return None, (out.astype(q.dtype).transpose(0, 3, 1, 2, 4), lse)

    _, (out, lse) = lax.scan(row, None, jnp.arange(T // block))
    out = jnp.moveaxis(out, 0, 1).reshape(B, T, K, G, H)
    return out, jnp.moveaxis(lse, 0, 3).reshape(B, K, G, T)


def _fwd(mask, block, q, k, v, q_tokens, kv_tokens):
    out, lse = _forward(mask, block, q, k, v, q_tokens, kv_tokens)
    return (out, lse), (q, k, v, q_tokens, kv_tokens, out, lse)


def _bwd(mask, block, saved, cotangents):
    q, k, v, q_tokens, kv_tokens, out, lse = saved
    g, g_lse = cotangents
    # d s = p * (d p - delta), and the log-sum-exp's own cotangent enters as -delta does.
    delta = (
        jnp.einsum("btkgh,btkgh->bkgt", g.astype(jnp.float32), out.astype(jnp.float32))
        - g_lse
    )
    dq, dk, dv = backward(mask, block, q, k, v, q_tokens, kv_tokens, g, lse, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def backward(mask, block, q, k, v, q_tokens, kv_tokens, g, lse, delta):
    """Returns fp32 gradients of q, k, v from the output's cotangent, log-sum-exp and delta.

    The log-sum-exp may be that of more keys than these: then the results are these keys' share.
    """
    T, S = q.shape[1], k.shape[1]

    def column(dq, j):
        k_j, v_j, kv_tok = (
            _at(k, j, block),
            _at(v, j, block),
            _tokens_at(kv_tokens, j, block),
        )

        def step(i, carry):
            dq, dk_j, dv_j = carry
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
        lo, hi = _span(mask, j, block, T // block, keys=False)
        dq, dk_j, dv_j = lax.fori_loop(lo, hi, step, (dq, zero, zero))
        return dq, (dk_j, dv_j)

    dq, (dk, dv) = lax.scan(
        column, jnp.zeros(q.shape, jnp.float32), jnp.arange(S // block)
    )
    dk, dv = (jnp.moveaxis(d, 0, 1).reshape(k.shape) for d in (dk, dv))
    return dq, dk, dv


attention.defvjp(_fwd, _bwd)
