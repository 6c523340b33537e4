"""The parts of layers in float64, written apart: what tests/reference.py makes models of.

Shapes: B batch, T queries, S keys, D embed, N query heads, K kv heads, G = N / K, H head dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.recurrent import Recurrent
from lm.nn.blockwise import Mask
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm
from lm.nn.moe import Softmax
from lm.nn.recurrent import Gru
from lm.nn.relative import Relative
from lm.nn.rope import Rope


def attention(mask, q, k, v, q_tokens, kv_tokens, bias=None):
    """Returns attention [B, T, K, G, H] and log-sum-exp [B, K, G, T] by the T x S formula.

    Computes in the dtype of q; a query that sees no key gives 0.
    """
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) * mask.scale
    if mask.softcap is not None:
        s = mask.softcap * jnp.tanh(s / mask.softcap)
    if bias is not None:
        s = s + bias
    d = q_tokens.positions[:, :, None] - kv_tokens.positions[:, None, :]
    seen = q_tokens.segments[:, :, None] == kv_tokens.segments[:, None, :]
    if mask.causal:
        seen &= d >= 0
    if mask.window is not None:
        seen &= abs(d) < mask.window
    seen = jnp.broadcast_to(seen[:, None, None], s.shape)
    s = jnp.where(seen, s, -jnp.inf)
    top = jnp.where(seen.any(-1), s.max(-1), 0)
    e = jnp.where(seen, jnp.exp(jnp.where(seen, s, 0) - top[..., None]), 0)
    norm = e.sum(-1)
    safe = jnp.where(norm > 0, norm, 1)
    out = jnp.einsum("bkgts,bskh->btkgh", e / safe[..., None], v)
    return out, jnp.where(norm > 0, top + jnp.log(safe), -jnp.inf)


def norm(p, path, c, x):
    if isinstance(c, LayerNorm.Config):
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.eps) * p[path + "/scale_d"]
    return y + p.get(path + "/bias_d", 0.0)


def by(p, path, c, x):
    return norm(p, path, c, x) if path + "/scale_d" in p else x


def rope(x, positions, base):
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half) / half)
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def mixer(c: Any, p, x, tokens):
    if isinstance(c, Recurrent.Config):
        return recurrent(c.mixer, p, x, tokens)
    return heads(c, p, "mixer", x, x, tokens, tokens, c.attention.causal)


def heads(c: Any, p, name, x, other, q_tokens, kv_tokens, causal, bias=None):
    """Returns what the heads of the attention `name` make of x, looking at `other`."""
    w = {
        k.removeprefix(f"{name}/"): v for k, v in p.items() if k.startswith(f"{name}/")
    }
    shift = lambda part: w.get(part, 0.0)  # noqa: E731
    q = jnp.einsum("btd,dnh->btnh", x, w["query_dnh"]) + shift("query_bias_nh")
    k = jnp.einsum("btd,dkh->btkh", other, w["key_dkh"]) + shift("key_bias_kh")
    v = jnp.einsum("btd,dkh->btkh", other, w["value_dkh"]) + shift("value_bias_kh")
    if c.attention.qk_norm:
        rms = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
        q = rms(q) * w["query_norm/scale_d"]
        k = rms(k) * w["key_norm/scale_d"]
    if isinstance(c.positions, Rope):
        q, k = (rope(a, q_tokens.positions, c.positions.base) for a in (q, k))
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    mask = Mask(
        scale=c.attention.scale or q.shape[-1] ** -0.5,
        causal=causal,
        window=c.attention.window,
        softcap=c.attention.softcap,
    )
    y, _ = attention(mask, q, k, v, q_tokens, kv_tokens, bias)
    y = y.reshape(*y.shape[:2], c.heads, -1)
    return jnp.einsum("btnh,nhd->btd", y, w["out_nhd"]) + shift("out_bias_d")


def bucket(c: Relative, ahead: int, causal: bool) -> int:
    """The bucket of a key so far ahead of a query: each of the near distances has one of its own,
    the far ones share those that are left by the logarithm (T5, section 2.1)."""
    count, far = c.buckets, max(-ahead, 0)
    if not causal:
        count, far = count // 2, abs(ahead)
    near = count // 2
    if far >= near:
        part = math.log(far / near) / math.log(c.distance / near)
        far = min(near + int(part * (count - near) + 1e-9), count - 1)
    return far + (count if ahead > 0 and not causal else 0)


def distances(c: Any, table, tokens, causal):
    """Returns the scores [B, N, 1, T, T] of the distances between positions."""
    if not isinstance(c.positions, Relative):
        return None
    longest = tokens.positions.shape[1]
    every = [bucket(c.positions, i, causal) for i in range(-longest, longest + 1)]
    ahead = tokens.positions[:, None, :] - tokens.positions[:, :, None]
    return jnp.moveaxis(table[:, jnp.asarray(every)[ahead + longest]], 0, 1)[:, :, None]


def recurrent(c: Any, p, x, tokens):
    """A state for each row, token by token; PyTorch's equations."""
    p = {k.removeprefix("mixer/"): v for k, v in p.items() if k.startswith("mixer/")}
    gates, bias = p["recurrent_ghk"], p["bias_ph"]
    h = cell = jnp.zeros((len(x), gates.shape[1]))
    ys, sigma = [], jax.nn.sigmoid
    for t in range(x.shape[1]):
        new = tokens.segments[:, t] != tokens.segments[:, max(t - 1, 0)]
        h, cell = (jnp.where(new[:, None], 0.0, s) for s in (h, cell))
        a = jnp.einsum("bd,gdh->gbh", x[:, t], p["input_gdh"])
        u = jnp.einsum("bh,ghk->gbk", h, gates)
        if isinstance(c, Gru.Config):
            r, z = (sigma(a[n] + u[n] + bias[n]) for n in range(2))
            n = jnp.tanh(a[2] + bias[3] + r * (u[2] + bias[2]))
            h = (1 - z) * n + z * h
        else:
            i, f, g, o = a + u + bias[:, None]
            cell = sigma(f + c.forget) * cell + sigma(i) * jnp.tanh(g)
            h = sigma(o) * jnp.tanh(cell)
        ys.append(h)
    return jnp.stack(ys, 1) @ p["out_hd"]


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_erf": lambda x: x * (1 + jax.lax.erf(x / 2**0.5)) / 2,
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": lambda x: x / (1 + jnp.exp(-x)),
}


def mlp(c: Mlp.Config, p, x):
    up = x @ p["up_df"] + p.get("up_bias_f", 0.0)
    if c.activation in ACTIVATIONS:
        h = ACTIVATIONS[c.activation](up)
    else:
        gate = x @ p["gate_df"] + p.get("gate_bias_f", 0.0)
        act = jax.nn.silu if c.activation == "swiglu" else jax.nn.gelu
        h = act(gate) * up
    return h @ p["down_fd"] + p.get("down_bias_d", 0.0)


def moe(c: Any, p, x, batch):
    """Returns y, and of the layer: losses [B], load [E], margin of the choice.

    Every expert on every token, SwiGLU; a choice counts if fewer than a buffer's slots of earlier
    tokens of the row are the same.
    """
    real, logits = batch["segments"] > 0, x @ p["router_de"]
    soft = isinstance(c.gate, Softmax)
    score = jax.nn.softmax(logits) if soft else jax.nn.sigmoid(logits)
    ranked = score + p.get("balance_e", 0.0)
    best = jnp.sort(ranked, -1)[..., ::-1]
    chosen = (ranked >= best[..., c.top_k - 1 : c.top_k]) & real[..., None]
    margin = jnp.where(real, best[..., c.top_k - 1] - best[..., c.top_k], 1).min()
    room = c.room(x.shape[1]) or x.shape[1]
    kept = chosen & (jnp.cumsum(chosen, 1) <= room)
    total = (score * chosen).sum(-1, keepdims=True)
    gates = score * kept / jnp.where(real[..., None], total, 1)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate_edf"]))
    h = h * jnp.einsum("btd,edf->btef", x, p["up_edf"])
    y = jnp.einsum("btef,efd,bte->btd", h, p["down_efd"], gates)
    if c.shared:
        shared = {k[7:]: v for k, v in p.items() if k.startswith("shared/")}
        y = y + mlp(Mlp.Config(), shared, x)
    n = jnp.maximum(real.sum(1), 1)
    share = (score / score.sum(-1, keepdims=True) * real[..., None]).sum(1)
    even = c.experts * (chosen.sum(1) * share).sum(-1) / (c.top_k * n * n)
    z = (jax.nn.logsumexp(logits, -1) ** 2 * real).sum(1) / n
    aux = (c.balance * even + c.z_loss * z, chosen.sum((0, 1)), margin)
    return y, aux
