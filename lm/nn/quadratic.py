"""Attention that forms the scores: for short sequences, where T x T numbers are cheap.

Its backward is written out so that the CPU runs every product by its fast matrix routine: heads
lead, products are plain batched ones, and a barrier keeps XLA's CPU backend from fusing elementwise
work into their operands. Causal rows are cut in two, and the first half skips the keys that none of
it may see.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim; x = B * K.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lm import sharding
from lm.nn.blockwise import NEG, Mask, Tokens, cap, visible

PARTS = 2  # into which the queries of a causal row are cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    mask: Mask,
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"]]:
    """Returns the attention output and the log-sum-exp of each query's scores (fp32).

    A query that sees no key gives 0 and a log-sum-exp of about -1e30.
    """
    return _fwd(mask, q_BTKGH, k_BSKH, v_BSKH, q_tokens, kv_tokens)[0]


def _parts(mask: Mask, T: int, S: int) -> list[tuple[int, int, int, int]]:
    """Ranges (t0, t1, s0, s1) of queries and of the keys that some of them may see."""
    if not (mask.causal and mask.ordered and T == S and T % PARTS == 0):
        return [(0, T, 0, S)]
    step, back = T // PARTS, (mask.window or T) - 1
    return [(t, t + step, max(0, t - back), t + step) for t in range(0, T, step)]


def _heads(x: Array) -> Array:
    """[B, T, K, ..., H] → [B K, ... T, H]: heads lead, the rest is rows of one matrix."""
    B, T, K, H = x.shape[0], x.shape[1], x.shape[2], x.shape[-1]
    return jnp.moveaxis(x, 1, -2).reshape(B * K, -1, H)


def _rows(x: Array, like: Array) -> Array:
    """The inverse of `_heads`."""
    B, T, K, *G, H = like.shape
    return jnp.moveaxis(x.reshape(B, K, *G, T, H), -2, 1)


def _seen(mask: Mask, q_tokens: Tokens, kv_tokens: Tokens, part, K: int, G: int) -> Array:
    """[B K, G t, s], true where the query may see the key."""
    t0, t1, s0, s1 = part
    q = Tokens(q_tokens.positions[:, t0:t1], q_tokens.segments[:, t0:t1])
    kv = Tokens(kv_tokens.positions[:, s0:s1], kv_tokens.segments[:, s0:s1])
    seen = visible(mask, q, kv)
    B, t, s = seen.shape
    return jnp.broadcast_to(seen[:, None, None], (B, K, G, t, s)).reshape(B * K, G * t, s)


def _fwd(mask, q, k, v, q_tokens, kv_tokens):
    B, T, K, G, H = q.shape
    kx, vx = _heads(k), _heads(v)
    outs, lses, saved = [], [], []
    for part in _parts(mask, T, k.shape[1]):
        t0, t1, s0, s1 = part
        s = jnp.einsum(
            "xth,xsh->xts", _heads(q[:, t0:t1]), kx[:, s0:s1],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        s, _ = cap(mask.softcap, s * mask.scale)
        seen = _seen(mask, q_tokens, kv_tokens, part, K, G)
        s = jnp.where(seen, s, NEG)
        top = s.max(-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(s - top), 0)
        norm = jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        p = (p / norm).astype(v.dtype)
        out = jnp.einsum("xts,xsh->xth", _plain(p), vx[:, s0:s1])
        outs.append(_rows(out, q[:, t0:t1]))
        lses.append((top + jnp.log(norm)).reshape(B, K, G, t1 - t0))
        saved.append(p)
    out, lse = jnp.concatenate(outs, 1), jnp.concatenate(lses, 3)
    return (out, lse), (q, k, v, out, lse, saved)


def _bwd(mask, residuals, cotangents):
    q, k, v, out, lse, saved = residuals
    g, g_lse = cotangents
    B, T, K, G, H = q.shape
    kx, vx = _heads(k), _heads(v)
    # d s = p * (d p - delta), and the log-sum-exp's own cotangent enters as -delta does.
    both = g.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.einsum("btkgh->bkgt", both) - g_lse
    dq, dk, dv = [], jnp.zeros(kx.shape, jnp.float32), jnp.zeros(vx.shape, jnp.float32)
    for p, (t0, t1, s0, s1) in zip(saved, _parts(mask, T, k.shape[1]), strict=True):
        qx, gx = _heads(q[:, t0:t1]), _heads(g[:, t0:t1])
        exact = {"preferred_element_type": jnp.float32}
        dp = jnp.einsum("xth,xsh->xts", gx, vx[:, s0:s1], **exact)
        d = delta[..., t0:t1].reshape(B * K, -1, 1)
        p32 = p.astype(jnp.float32)
        ds = p32 * (dp - d) * mask.scale
        if mask.softcap is not None:  # the capped score again, from p = exp(s - lse)
            s = jnp.log(jnp.maximum(p32, 1e-30)) + lse[..., t0:t1].reshape(B * K, -1, 1)
            ds = ds * (1 - (s / mask.softcap) ** 2)
        ds, p, qx, gx = _plain((ds.astype(q.dtype), p, qx, gx))
        dq.append(_rows(jnp.einsum("xts,xsh->xth", ds, kx[:, s0:s1]), q[:, t0:t1]))
        dk = dk.at[:, s0:s1].add(jnp.einsum("xts,xth->xsh", ds, qx, **exact))
        dv = dv.at[:, s0:s1].add(jnp.einsum("xts,xth->xsh", p, gx, **exact))
    dk, dv = (_rows(d, k).astype(k.dtype) for d in (dk, dv))
    return jnp.concatenate(dq, 1), dk, dv, None, None


def _plain(x):
    """On CPU, keeps XLA from fusing what made `x` into the product that reads it."""
    return lax.optimization_barrier(x) if sharding.current().platform == "cpu" else x


attention.defvjp(_fwd, _bwd)
