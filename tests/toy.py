"""Tiny experiments, batches and runs for the tests, and a float64 model that knows no mesh.

Shapes: B batch, T queries, S keys, D embed, N query heads, K kv heads, G = N / K, H head dim.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config, sharding, train, trees
from lm.config import ConfigError
from lm.data.loader import Data
from lm.data.tokenizer import Bytes
from lm.experiment import Experiment, Train
from lm.models.transformer import Transformer
from lm.nn.attention import Attention
from lm.nn.blockwise import Mask, Tokens
from lm.nn.ffn import Mlp
from lm.nn.layers import dropout, dropout_keys
from lm.optim import Constant, Optim, Sgd

ROWS, LENGTH, VOCAB = 16, 16, 257
EPS = float(np.finfo(np.float32).eps)

# Every way to lay a model over eight devices that must not change its maths.
MESHES = {
    "data 8": ["mesh.data=8"],
    "fsdp 8": ["mesh.fsdp=8"],
    "data 2 x fsdp 2 x tensor 2": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "data 4 x tensor 2": ["mesh.data=4", "mesh.tensor=2"],
    "data 2 x tensor 4": ["mesh.data=2", "mesh.tensor=4"],
    "data 2 x tensor 4, sequence": [
        "mesh.data=2",
        "mesh.tensor=4",
        "mesh.sequence_parallel=true",
    ],
    "data 4 x tensor 2, zero1": [
        "mesh.data=4",
        "mesh.tensor=2",
        "mesh.zero1=true",
        "mesh.sequence_parallel=true",
    ],
}

BASE = Experiment(
    name="toy",
    model=Transformer.Config(
        layers=2,
        dim=32,
        heads=4,
        kv_heads=2,
        vocab_size=VOCAB,
        vocab_multiple=64,
        attention=Attention.Config(qk_norm=True),
        ffn=Mlp.Config(hidden=64),
    ),
    data=Data(source=("text:none",), length=LENGTH, tokenizer=Bytes()),
    optim=Optim(
        algorithm=Sgd(),
        learning_rate=0.1,
        schedule=Constant(),
        weight_decay=0.0,
        clip_norm=None,
    ),
    mesh=sharding.MeshConfig(data=1),
    train=Train(steps=10, batch_size=ROWS),
)

# The other choices of every part of the model.
CLASSIC = [
    "model.norm=LayerNorm",
    "model.positions=Learned",
    "model.positions.length=16",
    "model.ffn.activation=gelu",
    "model.ffn.bias=true",
    "model.attention.bias=true",
    "model.attention.out_bias=true",
    "model.attention.qk_norm=false",
    "model.kv_heads=4",
]
CAPPED = [
    "model.tied=false",
    "model.ffn.activation=geglu",
    "model.ffn.bias=true",
    "model.attention.softcap=5",
    "model.attention.window=5",
    "model.attention.bias=true",
    "model.head_softcap=4",
    "model.kv_heads=1",
]


def experiment(*sets: str) -> Experiment:
    """Returns the toy experiment with overrides."""
    return config.override(BASE, sets)


def layout(mesh: sharding.MeshConfig) -> sharding.Layout:
    """Returns the layout of as many of the devices as the mesh has places."""
    count = int(np.prod([n for n in mesh.sizes().values() if n > 0]))
    return sharding.make_layout(mesh, jax.devices()[:count])


def program(*sets: str) -> train.Program:
    """Returns the program of the toy experiment with overrides, on emulated devices."""
    chosen = experiment(*sets)
    return train.program(chosen, layout(chosen.mesh))


def batch(seed: int = 0, rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """Returns packed rows of random tokens: up to three documents each, then padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (2, rows, length), np.int32)
    cuts = np.sort(rng.integers(1, length + 1, (rows, 3)), 1)
    segments = (np.arange(length) >= cuts[:, :2, None]).sum(1) + 1
    segments[np.arange(length) >= cuts[:, 2:]] = 0
    segments[: rows // 4] = 1  # some rows are one whole document
    scored = (segments > 0) & (rng.random((rows, length)) > 0.2)
    return {
        "tokens": ids[0],
        "targets": ids[1],
        "segments": segments.astype(np.int32),
        "positions": restart(segments),
        "weights": scored.astype(np.float32),
        "bytes": rng.integers(1, 50, rows).astype(np.int32),
        "index": np.arange(rows, dtype=np.uint32) + np.uint32(1000 * seed),
    }


def restart(segments: np.ndarray) -> np.ndarray:
    """Returns positions [B, T] that count from 0 in each run of equal segments."""
    new = np.diff(segments, axis=1, prepend=-1) != 0
    here = np.arange(segments.shape[1])
    return (here - np.maximum.accumulate(np.where(new, here, 0), 1)).astype(np.int32)


def place(prog: train.Program, host: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch on the program's devices."""
    rows = prog.batch_sharding().spec
    spec = jax.sharding.PartitionSpec
    return {
        k: jax.device_put(x, prog.sharding(spec(*rows[: x.ndim])))
        for k, x in host.items()
    }


@functools.cache
def _initial(chosen: Experiment) -> Any:
    prog = train.program(chosen, layout(chosen.mesh))
    return jax.tree.map(np.asarray, train.make_init(prog)(jax.random.key(1)))


def start(prog: train.Program, noise: float = 0.0) -> train.TrainState:
    """Returns the initial state: computed on one device, put where the program wants it.

    With `noise`, parameters are normal numbers of that size instead, around 1 for scales: no bias
    is 0, and nothing is compiled.
    """
    abstract = train.abstract_state(prog)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    if not noise:
        one = dataclasses.replace(prog.experiment, mesh=BASE.mesh, train=BASE.train)
        return jax.device_put(_initial(one), where)
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = {
        path: noise * rng.standard_normal(x.shape, np.float32)
        + path.endswith("scale_d")
        for path, x in prog.shapes.items()
    }
    params = trees.nest({k: v.astype(np.float32) for k, v in params.items()})
    ema = params if state.ema is not None else None
    return jax.device_put(dataclasses.replace(state, params=params, ema=ema), where)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves by path, on the host."""
    return {path: np.asarray(x) for path, x in trees.flatten(tree).items()}


def hidden(prog: train.Program) -> Any:
    """Returns a compiled function from parameters and a host's batch to hidden states and logits."""

    @jax.jit
    def run(params, batch):
        tokens = Tokens(batch["positions"], batch["segments"])
        model = prog.model(params)
        x_BTD, _, _ = model(batch["tokens"], tokens, None, prog.experiment.data.isolate)
        return x_BTD, model.logits(x_BTD)

    def call(params, host):
        with sharding.use(prog.layout):
            return [np.asarray(x) for x in run(params, place(prog, host))]

    return call


@dataclasses.dataclass(frozen=True)
class Run:
    """What a few steps of training left."""

    text: str  # the compiled step
    losses: list[float]
    metrics: list[dict[str, float]]  # of every step
    gradient: dict[str, np.ndarray]  # of the first step; empty but under SGD
    params: dict[str, np.ndarray]
    state: train.TrainState


def run(
    prog: train.Program, batches: Sequence[dict[str, Any]], state: Any = None
) -> Run:
    """Takes a step on each batch, in order, from the initial state or `state`."""
    state = start(prog) if state is None else state
    step = train.make_train_step(prog).lower(state, place(prog, batches[0])).compile()
    metrics, gradient = [], {}
    for host in batches:
        state, sums = step(state, place(prog, host))
        metrics.append({k: float(v) for k, v in sums.items()})
        if not gradient and isinstance(prog.experiment.optim.algorithm, Sgd):
            momentum = flat(state.opt_state)
            gradient = {p: _ending(momentum, p) for p in prog.shapes}
    losses = [m["loss"] for m in metrics]
    return Run(step.as_text(), losses, metrics, gradient, flat(state.params), state)


def _ending(leaves: dict[str, np.ndarray], path: str) -> np.ndarray:
    return next(x for name, x in leaves.items() if name.endswith(f"/{path}"))


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expects a ConfigError of one line that holds these words, in order."""
    with pytest.raises(ConfigError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert re.search(".*".join(map(re.escape, words)), message), message


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the norm of the difference, in float64."""
    return float(np.linalg.norm((np.asarray(a, np.float64) - b).ravel()))


# The reference: the whole model, its loss and its gradient in float64, written apart.


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
    eps = c.eps
    if path + "/bias_d" in p or type(c).__qualname__.startswith("LayerNorm"):
        x = x - x.mean(-1, keepdims=True)
    y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * p[path + "/scale_d"]
    return y + p[path + "/bias_d"] if path + "/bias_d" in p else y


def _rope(x, positions, base):
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half) / half)
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def _mixer(c: Transformer.Config, p, x, batch):
    shift = lambda name: p.get(f"mixer/{name}", 0.0)  # noqa: E731
    q = jnp.einsum("btd,dnh->btnh", x, p["mixer/query_dnh"]) + shift("query_bias_nh")
    k = jnp.einsum("btd,dkh->btkh", x, p["mixer/key_dkh"]) + shift("key_bias_kh")
    v = jnp.einsum("btd,dkh->btkh", x, p["mixer/value_dkh"]) + shift("value_bias_kh")
    if c.attention.qk_norm:
        rms = lambda x: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
        q = rms(q) * p["mixer/query_norm/scale_d"]
        k = rms(k) * p["mixer/key_norm/scale_d"]
    if hasattr(c.positions, "base"):
        q, k = (_rope(a, batch["positions"], c.positions.base) for a in (q, k))
    q = q.reshape(*q.shape[:2], c.kv_heads, -1, q.shape[-1])
    tokens = Tokens(batch["positions"], batch["segments"])
    mask = Mask(
        scale=q.shape[-1] ** -0.5,
        window=c.attention.window,
        softcap=c.attention.softcap,
    )
    y, _ = attention(mask, q, k, v, tokens, tokens)
    y = y.reshape(*y.shape[:2], c.heads, -1)
    return jnp.einsum("btnh,nhd->btd", y, p["mixer/out_nhd"]) + shift("out_bias_d")


def _ffn(c: Transformer.Config, p, x):
    up = x @ p["ffn/up_df"] + p.get("ffn/up_bias_f", 0.0)
    if c.ffn.activation == "gelu":
        h = jax.nn.gelu(up)
    else:
        gate = x @ p["ffn/gate_df"] + p.get("ffn/gate_bias_f", 0.0)
        act = jax.nn.silu if c.ffn.activation == "swiglu" else jax.nn.gelu
        h = act(gate) * up
    return h @ p["ffn/down_fd"] + p.get("ffn/down_bias_d", 0.0)


def _logits(c: Transformer.Config, p, batch, masks):
    """Returns the hidden states [B, T, D] and the logits [B, T, true vocabulary]."""
    masks = masks or [1.0] * (2 * c.layers + 1)
    x = p["embed_vd"][batch["tokens"]]
    if "position_pd" in p:
        x = x + p["position_pd"][batch["positions"]]
    x = x * masks[-1]
    for i in range(c.layers):
        layer = {
            k.removeprefix("layers/"): v[i]
            for k, v in p.items()
            if k.startswith("layers/")
        }
        h = _norm(layer, "norm1", c.norm, x)
        x = x + _mixer(c, layer, h, batch) * masks[2 * i]
        h = _norm(layer, "norm2", c.norm, x)
        x = x + _ffn(c, layer, h) * masks[2 * i + 1]
    x = _norm(p, "norm", c.norm, x)
    z = x @ p.get("head_vd", p["embed_vd"])[: c.vocab_size].T
    return x, z if c.head_softcap is None else c.head_softcap * jnp.tanh(
        z / c.head_softcap
    )


def token_loss(objective, z, targets):
    """Returns each token's loss [...] from its logits [..., V] over the true vocabulary."""
    lse = jax.nn.logsumexp(z, -1)
    nll = lse - jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
    smooth = objective.label_smoothing
    mixed = (1 - smooth) * nll + smooth * (lse - z.mean(-1))
    return mixed + objective.z_loss * lse**2


@functools.cache
def _reference(c: Transformer.Config, objective: Any):
    def loss(p, batch, masks):
        _, z = _logits(c, p, batch, masks)
        each = token_loss(objective, z, batch["targets"])
        return (each * batch["weights"]).sum() / batch["weights"].sum()

    return jax.jit(jax.value_and_grad(loss)), jax.jit(functools.partial(_logits, c))


def _double(tree: Any) -> Any:
    wide = lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype)  # noqa: E731
    return jax.tree.map(wide, tree)


def reference(chosen: Experiment, params: dict, host: dict, step: int = 0) -> Any:
    """Returns the loss and its gradient by path, in float64, of parameters by path."""
    masks = dropout_masks(chosen, host, step)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        grad, _ = _reference(chosen.model, chosen.objective)
        loss, grads = grad(*_double((params, host, masks)))
        return float(loss), jax.tree.map(np.asarray, grads)


def reference_logits(chosen: Experiment, params: dict, host: dict) -> Any:
    """Returns hidden states and logits in float64, without dropout."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        _, logits = _reference(chosen.model, chosen.objective)
        return jax.tree.map(np.asarray, logits(*_double((params, host)), None))


def dropout_masks(chosen: Experiment, host: dict, step: int) -> list[np.ndarray] | None:
    """Returns what each site multiplies by, [B, T, D]: two a layer, the embedding last."""
    c = chosen.model
    if not c.dropout:
        return None
    with sharding.use(layout(BASE.mesh)):
        keys = dropout_keys(
            chosen.train.seed, jnp.int32(step), jnp.asarray(host["index"]), LENGTH
        )
        ones = jnp.ones((*host["tokens"].shape, c.dim))
        sites = [4 * i + j for i in range(c.layers) for j in (0, 1)] + [2]
        return [np.asarray(dropout(ones, c.dropout, keys, site)) for site in sites]


# What a compiled program says between devices.


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    kind: str
    axes: frozenset[str]  # mesh axes over which its devices differ
    looped: bool  # inside a while loop


KINDS = r"all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """Returns the collectives in the text of a compiled program, with the axes they cross."""
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith("{") and (name := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            bodies[name[1]] = lines = []
        elif line.startswith("  ") and bodies:
            lines.append(line)
    calls = {
        name: {w for line in lines for w in re.findall(r"[\w.\-]+", line)}
        & bodies.keys()
        for name, lines in bodies.items()
    }
    looped: set[str] = set()
    todo = re.findall(r"body=%?([\w.\-]+)", text)
    while todo:
        if (name := todo.pop()) not in looped:
            looped.add(name)
            todo += calls[name]
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if kind := re.search(rf" ({KINDS})(?:-start)?\(", line):
                axes = _crossed(line, mesh)
                found.append(Collective(kind[1], axes, name in looped))
    return found


def _crossed(line: str, mesh: jax.sharding.Mesh) -> frozenset[str]:
    groups = _groups(line, mesh.size)
    crossed = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group), mesh.devices.shape)
        crossed |= {
            n for n, x in zip(mesh.axis_names, places, strict=True) if np.ptp(x)
        }
    return frozenset(crossed)


def _groups(line: str, devices: int) -> Any:
    """The groups of devices of a collective, in any of the ways that XLA writes them."""
    if iota := re.search(r"groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape(_ints(iota[2]))
        return (ids.transpose(_ints(iota[3])) if iota[3] else ids).reshape(
            _ints(iota[1])
        )
    named = r"groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
    if named := re.search(named, line):
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        ids = np.arange(devices)
        if named[2]:
            ids = ids.reshape(_ints(named[2]))
            ids = ids.transpose(_ints(named[3])) if named[3] else ids
        ids = ids.reshape([int(n) for _, n in axes])
        assert ":" not in named[4], f"a part of a mesh axis: {line[:400]}"
        inside = [
            [a for a, _ in axes].index(a) for a in re.findall(r"'(\w+)'", named[4])
        ]
        ids = np.moveaxis(ids, inside, range(-len(inside), 0))
        return ids.reshape(-1, math.prod(ids.shape[ids.ndim - len(inside) :]))
    if listed := re.search(r"(?:groups|pairs)=\{(\{[\d,{} ]+\})\}", line):
        return [_ints(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
    assert "groups={}" in line, f"no groups of devices understood: {line[:400]}"
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
