"""The whole model, its loss and its gradient in float64, written apart: the measure of the tests.

Shapes: B batch, T queries, S keys, D embed, N query heads, K kv heads, G = N / K, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toy

from lm import sharding
from lm.batches import Classification
from lm.experiment import Experiment
from lm.models import kinds, stack
from lm.models.encoder import Encoder
from lm.models.recurrent import Recurrent
from lm.models.transformer import Transformer
from lm.nn.blockwise import Mask, Tokens
from lm.nn.ffn import Mlp
from lm.nn.heads import Classes
from lm.nn.layers import LayerNorm, dropout, dropout_keys
from lm.nn.moe import Moe, Softmax
from lm.nn.recurrent import Gru
from lm.nn.rope import Rope


def attention(mask, q, k, v, q_tokens, kv_tokens):
    """Returns attention [B, T, K, G, H] and log-sum-exp [B, K, G, T] by the T x S formula.

    Computes in the dtype of q; a query that sees no key gives 0.
    """
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) * mask.scale
    if mask.softcap is not None:
        s = mask.softcap * jnp.tanh(s / mask.softcap)
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


def _norm(p, path, c, x):
    if isinstance(c, LayerNorm.Config):
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.eps) * p[path + "/scale_d"]
    return y + p.get(path + "/bias_d", 0.0)


def _by(p, path, c, x):
    return _norm(p, path, c, x) if path + "/scale_d" in p else x


def _rope(x, positions, base):
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half) / half)
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def _mixer(c: Any, p, x, batch):
    if isinstance(c, Recurrent.Config):
        return _recurrent(c.mixer, p, x, batch)
    shift = lambda name: p.get(f"mixer/{name}", 0.0)  # noqa: E731
    q = jnp.einsum("btd,dnh->btnh", x, p["mixer/query_dnh"]) + shift("query_bias_nh")
    k = jnp.einsum("btd,dkh->btkh", x, p["mixer/key_dkh"]) + shift("key_bias_kh")
    v = jnp.einsum("btd,dkh->btkh", x, p["mixer/value_dkh"]) + shift("value_bias_kh")
    if c.attention.qk_norm:
        rms = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
        q = rms(q) * p["mixer/query_norm/scale_d"]
        k = rms(k) * p["mixer/key_norm/scale_d"]
    if isinstance(c.positions, Rope):
        q, k = (_rope(a, batch["positions"], c.positions.base) for a in (q, k))
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    tokens = Tokens(batch["positions"], batch["segments"])
    mask = Mask(
        scale=q.shape[-1] ** -0.5,
        causal=c.attention.causal,
        window=c.attention.window,
        softcap=c.attention.softcap,
    )
    y, _ = attention(mask, q, k, v, tokens, tokens)
    y = y.reshape(*y.shape[:2], c.heads, -1)
    return jnp.einsum("btnh,nhd->btd", y, p["mixer/out_nhd"]) + shift("out_bias_d")


def _recurrent(c: Any, p, x, batch):
    """A state for each row, token by token; PyTorch's equations."""
    p = {k.removeprefix("mixer/"): v for k, v in p.items() if k.startswith("mixer/")}
    gates, bias = p["recurrent_ghk"], p["bias_ph"]
    h = cell = jnp.zeros((len(x), gates.shape[1]))
    ys, sigma = [], jax.nn.sigmoid
    for t in range(x.shape[1]):
        new = batch["segments"][:, t] != batch["segments"][:, max(t - 1, 0)]
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


def _gelu(kind, x):
    if kind == "gelu_erf":
        return x * (1 + jax.lax.erf(x / np.sqrt(2))) / 2
    return jax.nn.gelu(x)


def _mlp(c: Mlp.Config, p, x):
    up = x @ p["up_df"] + p.get("up_bias_f", 0.0)
    if c.activation.startswith("gelu"):
        h = _gelu(c.activation, up)
    else:
        gate = x @ p["gate_df"] + p.get("gate_bias_f", 0.0)
        act = jax.nn.silu if c.activation == "swiglu" else jax.nn.gelu
        h = act(gate) * up
    return h @ p["down_fd"] + p.get("down_bias_d", 0.0)


def _moe(c: Any, p, x, batch):
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
        y = y + _mlp(Mlp.Config(), shared, x)
    n = jnp.maximum(real.sum(1), 1)
    share = (score / score.sum(-1, keepdims=True) * real[..., None]).sum(1)
    even = c.experts * (chosen.sum(1) * share).sum(-1) / (c.top_k * n * n)
    z = (jax.nn.logsumexp(logits, -1) ** 2 * real).sum(1) / n
    aux = (c.balance * even + c.z_loss * z, chosen.sum((0, 1)), margin)
    return y, aux


def _place(c: Transformer.Config, i: int) -> tuple[str, int]:
    """Returns the prefix of layer i's parameters, and its entry of them."""
    for path, layers in stack.entries(c.blocks).items():
        if i in layers:
            return f"layers/{path}/" if path else "layers/", layers.index(i)
    raise AssertionError(i)


def _logits(c: Transformer.Config, p, batch, masks):
    """Returns the hidden states [B, T, D], the logits [B, T, true vocabulary], and of each layer
    with experts its losses, load and margin."""
    masks = masks or [1.0] * (2 * c.layers + 1)
    x = p["embed_vd"][batch["tokens"]]
    if "position_pd" in p:
        x = x + p["position_pd"][batch["positions"]]
    if isinstance(c, Encoder.Config):
        x = _norm(p, "norm", c.norm, x + p["type_cd"][0])
    x, routed = x * masks[-1], []
    for i in range(c.layers):
        prefix, entry = _place(c, i)
        layer = {
            k.removeprefix(prefix): v[entry]
            for k, v in p.items()
            if k.startswith(prefix)
        }
        h = _by(layer, "norm1", c.norm, x)
        y = _by(layer, "after1", c.norm, _mixer(c, layer, h, batch))
        x = _by(layer, "sum1", c.norm, x + y * masks[2 * i])
        if c.ffn is None:
            continue
        h = _by(layer, "norm2", c.norm, x)
        ffn = {k[4:]: v for k, v in layer.items() if k.startswith("ffn/")}
        if "router_de" in ffn:
            y, aux = _moe(c.ffn, ffn, h, batch)
            routed.append(aux)
        else:
            y = _mlp(c.ffn.dense if isinstance(c.ffn, Moe.Config) else c.ffn, ffn, h)
        x = x + _by(layer, "after2", c.norm, y) * masks[2 * i + 1]
        x = _by(layer, "sum2", c.norm, x)
    if isinstance(c, Encoder.Config):
        return _ended(c, p, x, batch)
    x = _norm(p, "norm", c.norm, x)
    if kinds.head(c) is not None:
        return _ended(c, p, x, batch)
    z = x @ p.get("head_vd", p["embed_vd"])[: c.vocab_size].T
    if c.head_softcap is not None:
        z = c.head_softcap * jnp.tanh(z / c.head_softcap)
    return x, z, routed


def _ended(c: Any, p, x, batch):
    """Returns what a head takes, its logits of ids or of classes, and no routing."""
    if isinstance(c.head, Classes.Config):
        there = batch["segments"] > 0
        count = there.sum(1, keepdims=True)
        place = {"first": 0, "last": count - 1}.get(c.head.pool)
        if place is not None:
            there = there & (batch["positions"] == place)
        mean = (x * there[..., None]).sum(1) / jnp.maximum(there.sum(1), 1)[:, None]
        h = jnp.tanh(mean @ p["end/pool_df"] + p["end/pool_bias_f"])
        return x, h @ p["end/class_dc"] + p["end/class_bias_c"], []
    h = _gelu(c.head.activation, x @ p["end/dense_de"] + p["end/dense_bias_e"])
    h = _norm(p, "end/after", LayerNorm.Config(eps=c.head.eps), h)
    z = h @ p["embed_vd"][: c.vocab_size].T + p["end/bias_v"][: c.vocab_size]
    return h, z, []


def token_loss(objective, z, targets):
    """Returns each token's loss [...] from its logits [..., V] over the true vocabulary."""
    lse = jax.nn.logsumexp(z, -1)
    nll = lse - jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    if isinstance(objective, Classification):
        return nll
    smooth = objective.label_smoothing
    mixed = (1 - smooth) * nll + smooth * (lse - z.mean(-1))
    return mixed + objective.z_loss * lse**2


@functools.cache
def _compiled(c: Transformer.Config, objective: Any):
    def loss(p, batch, masks):
        _, z, routed = _logits(c, p, batch, masks)
        each = token_loss(objective, z, batch["targets"])
        rows = sum((losses for losses, _, _ in routed), jnp.zeros(len(z)))
        each = each + (rows[:, None] if routed else 0)
        return (each * batch["weights"]).sum() / batch["weights"].sum()

    return jax.jit(jax.value_and_grad(loss)), jax.jit(functools.partial(_logits, c))


def _double(tree: Any) -> Any:
    wide = lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)  # noqa: E731
    return jax.tree.map(wide, tree)


def gradient(chosen: Experiment, params: dict, host: dict, step: int = 0) -> Any:
    """Returns the loss and its gradient by path, in float64, of parameters by path."""
    masks = dropout_masks(chosen, host, step)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        grad, _ = _compiled(chosen.model, chosen.objective)
        loss, grads = grad(*_double((params, host, masks)))
        return float(loss), jax.tree.map(np.asarray, grads)


def logits(chosen: Experiment, params: dict, host: dict) -> Any:
    """Returns hidden states and logits in float64, without dropout."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        _, run = _compiled(chosen.model, chosen.objective)
        x, z, _ = run(*_double((params, host)), None)
        return np.asarray(x), np.asarray(z)


def routing(chosen: Experiment, params: dict, host: dict, step: int) -> Any:
    """Returns the load [S, E] of the layers with experts, and the smallest margin of a choice."""
    masks = dropout_masks(chosen, host, step)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        _, run = _compiled(chosen.model, chosen.objective)
        _, _, routed = run(*_double((params, host, masks)))
        _, loads, margins = zip(*routed, strict=True)
        return np.stack([np.asarray(x) for x in loads]), min(map(float, margins))


def dropout_masks(chosen: Experiment, host: dict, step: int) -> list[np.ndarray] | None:
    """Returns what each site multiplies by, [B, T, D]: two a layer, the embedding last."""
    c = chosen.model
    if not c.dropout:
        return None
    with sharding.use(toy.layout(toy.BASE.mesh)):
        keys = dropout_keys(
            chosen.train.seed, jnp.int32(step), jnp.asarray(host["index"]), toy.LENGTH
        )
        ones = jnp.ones((*host["tokens"].shape, c.dim))
        sites = [4 * i + j for i in range(c.layers) for j in (0, 1)] + [2]
        return [np.asarray(dropout(ones, c.dropout, keys, site)) for site in sites]
