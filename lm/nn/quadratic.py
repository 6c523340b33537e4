"""Attention that forms the scores: for short sequences, where T x T numbers are cheap.

Its backward is written out so that the CPU runs every product by its fast matrix routine: heads
lead, products are plain batched ones, and a barrier keeps XLA's CPU backend from fusing elementwise
work into their operands. Causal rows are cut in two, and the first half skips the keys that none of
it may see.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim; x = B * K. R
is 1, or B.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lm import sharding
from lm.nn.blockwise import NEG, Mask, Tokens, cap, visible

PARTS = 2  # into which the queries of a causal row are cut
EXACT = {"preferred_element_type": jnp.float32}  # sums of products in fp32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    mask: Mask,
    packed: bool,
    q_BTKGH: Float[Array, "B T K G H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    bias_RKGTS: Float[Array, "R K G T S"] | None = None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B K G T"]]:
    """Returns the attention output and the log-sum-exp of each query's scores (fp32).

    `packed=False` promises that every row is one segment at positions 0, 1, 2, …. A query that sees
    no key gives 0 and a log-sum-exp of about -1e30. `bias` is added to the scores.
    """
    given = (q_BTKGH, k_BSKH, v_BSKH, q_tokens, kv_tokens, bias_RKGTS)
    return _fwd(mask, packed, *given)[0]


def _parts(mask: Mask, T: int, S: int) -> list[tuple[int, int, int, int]]:
    """Ranges (t0, t1, s0, s1) of queries and of the keys that some of them may see."""
    if not (mask.causal and mask.ordered and T == S and T % PARTS == 0):
        return [(0, T, 0, S)]
    step, back = T // PARTS, (mask.window or T) - 1
    return [(t, t + step, max(0, t - back), t + step) for t in range(0, T, step)]


def _heads(x: Array) -> Array:
    """[B, T, K, H] or [B, T, K, G, H] → [B K, T, H] or [B K, G, T, H]."""
    x = jnp.moveaxis(x, 1, -2)
    return x.reshape(-1, *x.shape[2:])


def _tokens(x: Array, batch: int) -> Array:
    """The inverse of `_heads`."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), -2, 1)


def _cut(x_XGTH: Array, t0: int, t1: int) -> Array:
    """Rows t0 to t1 of every head, the heads of a group as rows of one matrix: [X, G t, H]."""
    return x_XGTH[:, :, t0:t1].reshape(x_XGTH.shape[0], -1, x_XGTH.shape[-1])


def _hidden(
    mask: Mask, packed: bool, q_tokens: Tokens, kv_tokens: Tokens, part
) -> Array:
    """[B, 1, 1, t, s] (B is 1 where all rows are alike): 0 where the query sees the key, or NEG."""
    t0, t1, s0, s1 = part
    if packed or not mask.ordered:
        q = Tokens(q_tokens.positions[:, t0:t1], q_tokens.segments[:, t0:t1])
        kv = Tokens(kv_tokens.positions[:, s0:s1], kv_tokens.segments[:, s0:s1])
    else:
        one = np.zeros((1, max(t1, s1)), np.int32)
        row = np.arange(one.size, dtype=np.int32)[None]
        q, kv = (
            Tokens(row[:, t0:t1], one[:, t0:t1]),
            Tokens(row[:, s0:s1], one[:, s0:s1]),
        )
    return jnp.where(visible(mask, q, kv), 0.0, NEG)[:, None, None]


def _fwd(mask, packed, q, k, v, q_tokens, kv_tokens, bias):
    B, T, K, G, H = q.shape
    qx, kx, vx = _plain((_heads(q), _heads(k), _heads(v)))
    outs, lses, saved = [], [], []
    for part in _parts(mask, T, k.shape[1]):
        t0, t1, s0, s1 = part
        s = jnp.einsum("xth,xsh->xts", _cut(qx, t0, t1), kx[:, s0:s1], **EXACT)
        s, _ = cap(mask.softcap, s * mask.scale)
        more = _hidden(mask, packed, q_tokens, kv_tokens, part)
        if bias is not None:
            more = more + bias[..., t0:t1, s0:s1]
        s = (s.reshape(B, K, G, t1 - t0, s1 - s0) + more).reshape(s.shape)
        top = jnp.maximum(
            s.max(-1, keepdims=True), 0.5 * NEG
        )  # so that exp gives 0 if all hide
        e = jnp.exp(s - top)
        norm = jnp.maximum(e.sum(-1, keepdims=True), 1e-30)
        p = _plain((e / norm).astype(v.dtype))
        outs.append(
            jnp.einsum("xts,xsh->xth", p, vx[:, s0:s1]).reshape(B * K, G, -1, H)
        )
        lses.append((top + jnp.log(norm)).reshape(B, K, G, t1 - t0))
        saved.append(p)
    out, lse = _tokens(jnp.concatenate(outs, 2), B), jnp.concatenate(lses, 3)
    return (out, lse), (q, k, v, bias, out, lse, saved)


def _bwd(mask, packed, residuals, cotangents):
    q, k, v, bias, out, lse, saved = residuals
    g, g_lse = cotangents
    B, T, K, G, H = q.shape
    qx, kx, vx, gx = _plain(tuple(map(_heads, (q, k, v, g))))
    # d s = p * (d p - delta), and the log-sum-exp's own cotangent enters as -delta does.
    both = _heads(out).astype(jnp.float32) * gx.astype(jnp.float32)
    delta = both.sum(-1) - g_lse.reshape(B * K, G, T)
    dq, dk, dv = [], jnp.zeros(kx.shape, jnp.float32), jnp.zeros(vx.shape, jnp.float32)
    d_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    for p, (t0, t1, s0, s1) in zip(saved, _parts(mask, T, k.shape[1]), strict=True):
        qt, gt = _cut(qx, t0, t1), _cut(gx, t0, t1)
        dp = jnp.einsum("xth,xsh->xts", gt, vx[:, s0:s1], **EXACT)
        p32 = p.astype(jnp.float32)
        ds = p32 * (dp - delta[:, :, t0:t1].reshape(B * K, -1, 1))
        if d_bias is not None:
            of_rows = ds.reshape(len(d_bias), -1, K, G, t1 - t0, s1 - s0).sum(1)
            d_bias = d_bias.at[..., t0:t1, s0:s1].add(of_rows)
        ds = ds * mask.scale
        if mask.softcap is not None:  # the capped score again, from p = exp(s - lse)
            s = jnp.log(jnp.maximum(p32, 1e-30)) + lse[..., t0:t1].reshape(B * K, -1, 1)
            ds = ds * jnp.where(p32 > 0, 1 - (s / mask.softcap) ** 2, 0)
        ds = _plain(ds.astype(q.dtype))
        dq.append(jnp.einsum("xts,xsh->xth", ds, kx[:, s0:s1]).reshape(B * K, G, -1, H))
        dk = dk.at[:, s0:s1].add(jnp.einsum("xts,xth->xsh", ds, qt, **EXACT))
        dv = dv.at[:, s0:s1].add(jnp.einsum("xts,xth->xsh", p, gt, **EXACT))
    dk, dv = (_tokens(d, B).astype(k.dtype) for d in (dk, dv))
    return _tokens(jnp.concatenate(dq, 2), B), dk, dv, None, None, d_bias


def _plain(x):
    """On CPU, keeps XLA from fusing what made `x` into the product that reads it."""
    return lax.optimization_barrier(x) if sharding.current().platform == "cpu" else x


attention.defvjp(_fwd, _bwd)
