"""The whole model, its loss and its gradient in float64, written apart: the measure of the tests.

Shapes: B batch, T queries, S keys, D embed, N query heads, K kv heads, G = N / K, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference_parts as parts
import toy

from lm import sharding, train
from lm.batches import Classification
from lm.experiment import Experiment
from lm.models import kinds, stack
from lm.models.encoder import Encoder
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.transformer import Transformer
from lm.nn.blockwise import Tokens
from lm.nn.heads import Classes
from lm.nn.layers import LayerNorm, Sinusoidal, dropout, dropout_keys
from lm.nn.moe import Moe


def _place(c: Transformer.Config, i: int) -> tuple[str, int]:
    """Returns the prefix of layer i's parameters, and its entry of them."""
    for path, layers in stack.entries(c.blocks).items():
        if i in layers:
            return f"layers/{path}/" if path else "layers/", layers.index(i)
    raise AssertionError(i)


def _logits(c: Transformer.Config, p, batch, masks):
    """Returns the hidden states [B, T, D], the logits [B, T, true vocabulary], and of each layer
    with experts its losses, load and margin."""
    if isinstance(c, EncoderDecoder.Config):
        return _written(c, p, batch, masks)
    tokens = Tokens(batch["positions"], batch["segments"])
    x = p["embed_vd"][batch["tokens"]]
    if "position_pd" in p:
        x = x + p["position_pd"][batch["positions"]]
    if isinstance(c, Encoder.Config):
        x = parts.norm(p, "norm", c.norm, x + p["type_cd"][0])
    keep = _keep(masks, "tokens")
    x, routed = x * keep(2), []
    for i in range(c.layers):
        prefix, entry = _place(c, i)
        layer = {
            k.removeprefix(prefix): v[entry]
            for k, v in p.items()
            if k.startswith(prefix)
        }
        mixer = lambda h, w=layer: parts.mixer(c, w, h, tokens)  # noqa: E731
        x = _part(c, layer, 1, x, mixer, keep(4 * i))
        if c.ffn is None:
            continue
        ffn = {k[4:]: v for k, v in layer.items() if k.startswith("ffn/")}

        def forward(h, ffn=ffn):
            if "router_de" not in ffn:
                dense = c.ffn.dense if isinstance(c.ffn, Moe.Config) else c.ffn
                return parts.mlp(dense, ffn, h)
            y, aux = parts.moe(c.ffn, ffn, h, batch)
            routed.append(aux)
            return y

        x = _part(c, layer, 2, x, forward, keep(4 * i + 1))
    if isinstance(c, Encoder.Config):
        return _ended(c, p, x, batch)
    x = parts.norm(p, "norm", c.norm, x)
    if kinds.head(c) is not None:
        return _ended(c, p, x, batch)
    return *_head(c, p, x), routed


def _keep(masks, name):
    return lambda site: masks[name][site] if masks else 1.0


def _part(c, p, number, x, f, keep):
    """One part of a layer and its norms, around the stream."""
    y = f(parts.by(p, f"norm{number}", c.norm, x))
    x = x + parts.by(p, f"after{number}", c.norm, y) * keep
    return parts.by(p, f"sum{number}", c.norm, x)


def _head(c, p, x):
    z = x @ p.get("head_vd", p["embed_vd"])[: c.vocab_size].T
    if "shift_v" in p:
        z = z + p["shift_v"][: c.vocab_size]
    if c.head_softcap is not None:
        z = c.head_softcap * jnp.tanh(z / c.head_softcap)
    return x, z


def _written(c: EncoderDecoder.Config, p, batch, masks):
    """The same of an encoder and a decoder: hidden states and logits of what is written."""
    read = Tokens(batch["input_positions"], batch["input_segments"])
    tokens = Tokens(batch["positions"], batch["segments"])
    L, source, x = c.layers, batch["inputs"], batch["tokens"]
    if c.start is not None:
        x = jnp.where(batch["positions"] == 0, c.start, x)
    source, x = (
        _waves(c, p["embed_vd"][ids] * c.embed_scale, at) * _keep(masks, name)(site)
        for name, ids, at, site in (
            ("inputs", source, read.positions, 4 * L + 2),
            ("tokens", x, tokens.positions, 2),
        )
    )

    def layer(prefix, i):
        return {
            k.removeprefix(prefix): v[i] for k, v in p.items() if k.startswith(prefix)
        }

    def mixed(w, h, at, causal, table):
        bias = parts.distances(c, p.get(table), at, causal)
        return parts.heads(c, w, "mixer", h, h, at, at, causal, bias)

    def ffn(w, h):
        return parts.mlp(
            c.ffn, {k[4:]: v for k, v in w.items() if k.startswith("ffn/")}, h
        )

    keep, table = _keep(masks, "inputs"), "encoder_distance_nb"
    for i in range(c.encoder_layers):
        w, site = layer("encoder/", i), 4 * (L + i)
        mixer = lambda h, w=w: mixed(w, h, read, False, table)  # noqa: E731
        source = _part(c, w, 1, source, mixer, keep(site))
        source = _part(c, w, 2, source, lambda h, w=w: ffn(w, h), keep(site + 1))
    source, keep = parts.by(p, "encoder_norm", c.norm, source), _keep(masks, "tokens")
    for i in range(L):
        w = layer("layers/", i)
        mixer = lambda h, w=w: mixed(w, h, tokens, True, "distance_nb")  # noqa: E731
        x = _part(c, w, 1, x, mixer, keep(4 * i))
        cross = lambda h, w=w: parts.heads(  # noqa: E731
            c, w, "cross", h, source, tokens, read, False
        )
        x = _part(c, w, 3, x, cross, keep(4 * i + 3))
        x = _part(c, w, 2, x, lambda h, w=w: ffn(w, h), keep(4 * i + 1))
    return *_head(c, p, parts.by(p, "norm", c.norm, x) * c.head_scale), []


def _waves(c: EncoderDecoder.Config, x, positions):
    """Adds sines and cosines of the positions (Vaswani et al. 2017, section 3.5)."""
    if not isinstance(c.positions, Sinusoidal):
        return x
    D = x.shape[-1]
    for i in range(D):
        angle = positions / c.positions.base ** (2 * (i // 2) / D)
        at = i // 2 + i % 2 * (D // 2) if c.positions.halves else i
        x = x.at[:, :, at].add(jnp.cos(angle) if i % 2 else jnp.sin(angle))
    return x


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
    h = x @ p["end/dense_de"] + p["end/dense_bias_e"]
    h = parts.ACTIVATIONS[c.head.activation](h)
    h = parts.norm(p, "end/after", LayerNorm.Config(eps=c.head.eps), h)
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


def agrees(prog: train.Program, host: dict, *, loss: float, ulps: int, floor: float):
    """Checks a step's loss and every gradient against these, from parameters around 0.1.

    Args:
        prog: on its mesh, under SGD.
        host: the batch.
        loss: relative error that the loss may have.
        ulps: and a gradient, in roundings of its norm.
        floor: added to these, where a gradient is 0 by its formula.
    """
    state = toy.start(prog, noise=0.1)
    params = toy.flat(train.saved(prog, state).params)
    exact = {k: v.astype(np.float64) for k, v in params.items()}
    want, grads = gradient(prog.experiment, exact, host)
    run = toy.run(prog, [host], state)
    assert abs(run.losses[0] / want - 1) < loss, prog.layout.mesh
    assert run.gradient.keys() == grads.keys()
    for path, exactly in grads.items():
        most = ulps * toy.EPS * np.linalg.norm(exactly) + floor
        error = toy.distance(run.gradient[path], exactly)
        assert error < most, (prog.layout.mesh, path)


def routing(chosen: Experiment, params: dict, host: dict, step: int) -> Any:
    """Returns the load [S, E] of the layers with experts, and the smallest margin of a choice."""
    masks = dropout_masks(chosen, host, step)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        _, run = _compiled(chosen.model, chosen.objective)
        _, _, routed = run(*_double((params, host, masks)))
        _, loads, margins = zip(*routed, strict=True)
        return np.stack([np.asarray(x) for x in loads]), min(map(float, margins))


def dropout_masks(chosen: Experiment, host: dict, step: int) -> dict | None:
    """Returns what each site multiplies by, [B, T, D], of the rows that are read and written."""
    c = chosen.model
    if not c.dropout:
        return None
    sites = {"tokens": [4 * i + j for i in range(c.layers) for j in (0, 1, 3)] + [2]}
    if isinstance(c, EncoderDecoder.Config):
        first, end = 4 * c.layers, 4 * (c.layers + c.encoder_layers)
        sites["inputs"] = [*range(first, end, 4), *range(first + 1, end, 4), first + 2]

    def kept(name, site):
        ones = jnp.ones((*host[name].shape, c.dim))
        index = jnp.asarray(host["index"])
        keys = dropout_keys(chosen.train.seed, jnp.int32(step), index, ones.shape[1])
        return np.asarray(dropout(ones, c.dropout, keys, site))

    with sharding.use(toy.layout(toy.BASE.mesh)):
        return {
            name: {site: kept(name, site) for site in some}
            for name, some in sites.items()
        }
