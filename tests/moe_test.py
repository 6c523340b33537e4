"""A layer of experts is a loop over tokens in float64, whatever the buffers and the devices.

Shapes: B rows, T length, D embed, F hidden width, E experts, K choices of a token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from flax import nnx
from jax.sharding import AxisType, Mesh

from lm import sharding
from lm.nn import dispatch, ragged
from lm.nn.blockwise import Tokens
from lm.nn.layers import Side
from lm.nn.moe import Capacity, Dropless, Limited, Moe, Sigmoid, Softmax

B, T, D, F, E = 8, 16, 12, 10, 8
ONE = Softmax(renormalize=False)
KINDS = {
    "softmax": Moe.Config(hidden=F),
    "top 1, gelu": Moe.Config(hidden=F, top_k=1, gate=ONE, activation="gelu"),
    "sigmoid, shared, tight": Moe.Config(
        hidden=F, gate=Sigmoid(scale=1.5), shared=2, dispatch=Capacity(factor=0.75)
    ),
    "dropless": Moe.Config(hidden=F, dispatch=Dropless(), activation="geglu"),
    "clamped, shifted, in groups": Moe.Config(
        hidden=F, top_k=3, activation="clamped", limit=0.5, bias=True, router_bias=True,
        shared=1, shared_gate=True, limited=Limited(groups=4, keep=2),
        gate=Softmax(scale=1.5), dispatch=Capacity(factor=0.75),
    ),
}  # fmt: skip
MESHES = {
    "data 2 x expert 4": {"data": 2, "expert": 4},
    "fsdp 2 x expert 2 x tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "seq 2 x expert 2 x tensor 2": {"seq": 2, "expert": 2, "tensor": 2},
}
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, D)).astype(np.float32)
GRADIENT = RNG.standard_normal((B, T, D)).astype(np.float32)
SEGMENTS = np.repeat([[1] * 5 + [2] * 8 + [0] * 3], B, 0).astype(np.int32)
SEGMENTS[0] = 1  # a row without padding
POSITIONS = toy.restart(SEGMENTS)
REAL = SEGMENTS > 0


def layout(**sizes):
    """A layout of any axes, those that a run refuses too."""
    shape = [sizes.get(axis, 1) for axis in sharding.AXES]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    types = (AxisType.Explicit,) * len(shape)
    return sharding.Layout(
        Mesh(devices, sharding.AXES, axis_types=types), sharding.Rules(), "cpu"
    )


def apply(config, sizes=None, x=X, order: Any = slice(None), cached=False):
    """Returns y, aux, and gradients by path (x's as "x") of a layer with random weights."""
    place = layout(**(sizes or {}))
    with sharding.use(place):
        model = Moe(config, D, 0.3, 0.3, nnx.Rngs(params=0))
        if isinstance(config.gate, Sigmoid):
            bias = np.random.default_rng(1).normal(0, 0.1, E).astype(np.float32)
            model.balance_e = nnx.Param(jnp.asarray(bias), axes=("balance",))
        for name, p in vars(model).items():
            if isinstance(p, nnx.Param) and "_bias_" in name:  # born 0
                noise = np.random.default_rng(2).normal(0, 0.3, p.shape)
                value = jax.device_put(np.float32(noise), p[...].sharding)
                setattr(model, name, nnx.Param(value, axes=p.axes))

        def put(a):
            spec = sharding.spec("batch", "length", *[None] * (a.ndim - 2))
            return jax.device_put(a[:, order], sharding.shard(place, spec))

        tokens = Tokens(put(POSITIONS), put(SEGMENTS))
        side = Side(tokens, cached=tokens if cached else None)

        def loss(model, x, g):
            y, aux = model(x, side)
            return (y * g).sum() + aux["moe_loss_B"].sum(), (y, aux)

        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (_, (y, aux)), (grads, dx) = run(model, put(x), put(GRADIENT))
        found = {k.replace("/value", ""): np.asarray(v) for k, v in flat(grads).items()}
        aux = {k: np.asarray(v) for k, v in aux.items()}
        weights = {k.replace("/value", ""): v for k, v in flat(model).items()}
        return np.asarray(y), aux, {**found, "x": np.asarray(dx)}, weights


def flat(module):
    return {
        k: np.asarray(v)
        for k, v in toy.flat(nnx.to_pure_dict(nnx.state(module))).items()
    }


def expert_of(activation, t, up, down, gate, *shifts):
    """One expert on one token."""
    up_bias, down_bias, gate_bias = shifts or (0, 0, 0)
    act = jax.nn.silu if activation == "swiglu" else jax.nn.gelu
    up = t @ up + up_bias
    if gate is None:
        return act(up) @ down + down_bias
    gate = t @ gate + gate_bias
    if activation == "clamped":
        gate, up = jnp.minimum(gate, 0.5), jnp.clip(up, -0.5, 0.5)
        return (gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1)) @ down + down_bias
    return (act(gate) * up) @ down + down_bias


def in_groups(config, ranked):
    """The scores by which one chooses: -1 in all groups but the best."""
    if config.limited is None:
        return ranked
    best = np.argsort(-ranked.reshape(4, 2).max(-1))[:2]
    return np.where(np.isin(np.arange(E) // 2, best), ranked, -1)


def loop(config, w, x):
    """The layer as a loop over tokens, in float64: loss, (y, losses, load, dropped, margin)."""
    k, room = config.top_k, config.room(T)
    soft = isinstance(config.gate, Softmax)
    expert = functools.partial(expert_of, config.activation)
    y, losses = jnp.zeros((B, T, D)), []
    load, dropped, margin = np.zeros(E, int), 0, np.inf
    for b in range(B):
        taken, shares, z = np.zeros(E, int), jnp.zeros(E), 0.0
        for t in range(T):
            if config.shared:
                names = ("up_df", "down_fd", "gate_df")
                part = expert(x[b, t], *(w["shared/" + n] for n in names))
                if config.shared_gate:
                    part = part * jax.nn.sigmoid(x[b, t] @ w["shared_gate_d"])
                y = y.at[b, t].add(part)
            if not REAL[b, t]:
                continue
            logits = x[b, t] @ w["router_de"] + w.get("router_bias_e", 0)
            score = jax.nn.softmax(logits) if soft else jax.nn.sigmoid(logits)
            ranked = np.asarray(jax.lax.stop_gradient(score)) + w.get("balance_e", 0)
            ranked = in_groups(config, ranked)
            best = np.argsort(-ranked, kind="stable")
            margin = min(margin, ranked[best[k - 1]] - ranked[best[k]])
            total = score[best[:k]].sum() if config.gate.renormalize else 1.0
            for e in best[:k]:
                if room is not None and taken[e] >= room:
                    dropped += 1
                else:
                    one = (w["up_edf"][e], w["down_efd"][e])
                    gate = w["gate_edf"][e] if "gate_edf" in w else None
                    names = ("up_bias_ef", "down_bias_ed", "gate_bias_ef")
                    shifts = [w[n][e] for n in names if config.bias]
                    one = expert(x[b, t], *one, gate, *shifts)
                    part = score[e] / total * config.gate.scale * one
                    y = y.at[b, t].add(part)
                taken[e] += 1
            shares, z = shares + score / score.sum(), z + jax.nn.logsumexp(logits) ** 2
        n = REAL[b].sum()
        even = E * (taken / (n * k) * shares / n).sum()
        losses.append(config.balance * even + config.z_loss * z / n)
        load += taken
    losses = jnp.stack(losses)
    return (y * GRADIENT).sum() + losses.sum(), (y, losses, load, dropped, margin)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_a_loop_over_tokens(kind):
    config = KINDS[kind]
    y, aux, grads, weights = apply(config)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        double = {k: v.astype(np.float64) for k, v in weights.items()}
        # Decisions need values, gradients a tracer: the loop looks at primal values alone.
        loss = lambda w, x: loop(config, {**double, **w}, x)  # noqa: E731
        trained = {k: v for k, v in double.items() if k != "balance_e"}
        _, vjp, results = jax.vjp(loss, trained, X.astype(np.float64), has_aux=True)
        (want, dx) = vjp(np.float64(1.0))
    y64, losses, load, dropped, margin = results
    assert margin > 100 * toy.EPS  # no choice is a matter of rounding
    np.testing.assert_allclose(y, y64, atol=1e-5)
    np.testing.assert_allclose(aux["moe_loss_B"], losses, rtol=1e-5)
    np.testing.assert_array_equal(aux["moe_load_E"], load)
    assert aux["moe_dropped"] == dropped
    assert (dropped > 0) == isinstance(config.dispatch, Capacity)
    for path, exact in {**want, "x": dx}.items():
        error = toy.distance(grads[path], np.asarray(exact))
        assert error < 16 * toy.EPS * np.linalg.norm(exact), path
        assert np.linalg.norm(exact) > 0, path
    if "balance_e" in grads:
        assert not grads["balance_e"].any()


@pytest.mark.parametrize("room", [None, 1, 3, T])
def test_a_buffer_takes_choices_in_order_until_it_is_full(room):
    rng = np.random.default_rng(2)
    choice = np.argsort(rng.random((B, T, E)), -1)[..., :3].astype(np.int32)
    choice[~REAL] = E
    with sharding.use(layout()):
        tokens = Tokens(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
        found = dispatch.plan(jnp.asarray(choice), tokens, E, room)
        index, slot, count, lost = (np.asarray(a) for a in found)
    C = T if room is None else room
    assert index.shape == (B, E * C)
    for b in range(B):
        taken, missed = np.zeros(E, int), 0
        seats = np.full(E * C, T * 3)
        for t in range(T):
            for j, e in enumerate(choice[b, t]):
                if e == E or taken[e] >= C:
                    assert slot[b, t, j] == E * C
                    missed += e != E
                else:
                    assert slot[b, t, j] == e * C + taken[e]
                    seats[slot[b, t, j]] = t * 3 + j
                if e != E:
                    taken[e] += 1
        np.testing.assert_array_equal(index[b], seats)
        np.testing.assert_array_equal(count[b], taken)
        assert lost[b] == missed


def same(got, want, times=8.0):
    """Outputs, losses and gradients equal but for the order of sums; counts equal."""
    np.testing.assert_array_equal(got[1]["moe_load_E"], want[1]["moe_load_E"])
    assert got[1]["moe_dropped"] == want[1]["moe_dropped"]
    np.testing.assert_allclose(got[1]["moe_loss_B"], want[1]["moe_loss_B"], rtol=1e-5)
    for path, value in {**want[2], "y": want[0]}.items():
        mine = got[0] if path == "y" else got[2][path]
        limit = times * toy.EPS * np.linalg.norm(value)
        assert toy.distance(mine, value) <= limit, path


def test_endless_capacity_drops_nothing():
    config = KINDS["dropless"]
    endless = dataclasses.replace(config, dispatch=Capacity(factor=1e9))
    assert endless.room(T) == T
    got, want = apply(endless), apply(config)
    same(got, want, times=0)
    assert got[1]["moe_dropped"] == 0


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "kind", ["sigmoid, shared, tight", "dropless", "clamped, shifted, in groups"]
)
def test_a_mesh_does_not_change_the_layer(kind, mesh):
    """The length may lie in any order over its devices: here two chunks on each of two."""
    order: Any = slice(None)
    if MESHES[mesh].get("seq"):
        order = np.concatenate([np.arange(4 * c, 4 * c + 4) for c in (0, 3, 1, 2)])
    y, aux, grads, _ = apply(KINDS[kind], MESHES[mesh], order=order)
    want = apply(KINDS[kind])
    back = np.argsort(np.arange(T)[order])
    same((y[:, back], aux, {**grads, "x": grads["x"][:, back]}), want)


@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_sorted_rows_are_the_same_as_slots(mesh, monkeypatch):
    """What accelerators run, its exchange emulated: it drops nothing either."""
    kinds = ("dropless", "top 1, gelu", "clamped, shifted, in groups")
    for config in map(KINDS.get, kinds):
        config = dataclasses.replace(config, dispatch=Dropless())
        want = apply(config)
        with monkeypatch.context() as patch:
            patch.setattr(ragged, "fits", lambda: True)
            same(apply(config, MESHES.get(mesh)), want)


@pytest.mark.parametrize("sort", [False, True], ids=["slots", "sorted"])
def test_stages_are_a_vmap(sort, monkeypatch):
    """As in a pipeline: each stage has weights and rows of its own; no stage sees another's."""
    monkeypatch.setattr(ragged, "fits", lambda: sort)
    config = KINDS["dropless"]
    place = layout(pipe=2, expert=2, tensor=2)
    with sharding.use(place):
        rngs = nnx.Rngs(params=0).split(2)
        models = jax.vmap(lambda r: Moe(config, D, 0.3, 0.3, r))(rngs)
        stage = sharding.spec("layers", "batch", None, None)
        x = jax.device_put(np.stack([X, X[::-1]]), sharding.shard(place, stage))
        tokens = [np.stack([a, a[::-1]]) for a in (POSITIONS, SEGMENTS)]
        rows = sharding.shard(place, sharding.spec("layers", "batch", None))
        tokens = Tokens(*(jax.device_put(a, rows) for a in tokens))

        stored = jax.tree.map(
            lambda a: jax.device_put(a, sharding.shard(place, _stage(a))), models
        )
        run = jax.jit(jax.vmap(jax.grad(_square, (0, 1))))
        mapped = frozenset(place.axes("layers"))
        with sharding.use(dataclasses.replace(place, mapped=mapped)):
            got = jax.tree.map(np.asarray, run(stored, x, tokens))
    monkeypatch.setattr(ragged, "fits", lambda: False)
    with sharding.use(layout()):
        for i in range(2):
            one = jax.tree.map(lambda a, i=i: jnp.asarray(np.asarray(a)[i]), models)
            rows = jax.tree.map(lambda a, i=i: jnp.asarray(np.asarray(a)[i]), tokens)
            run = jax.jit(jax.grad(_square, (0, 1)))
            want = run(one, jnp.asarray(np.asarray(x)[i]), rows)
            for mine, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
                limit = 8 * toy.EPS * np.linalg.norm(theirs)
                assert toy.distance(mine[i], np.asarray(theirs)) <= limit


def _square(model, x, tokens):
    y, aux = model(x, Side(tokens))
    return (y * y).sum() + aux["moe_loss_B"].sum()


def _stage(a):
    axes = ["expert"] if a.ndim == 4 else [None] * (a.ndim - 1)
    return sharding.spec("layers", *axes)


def test_a_cache_drops_nothing():
    """Else a text would depend on how many of its tokens are read at a time."""
    tight = KINDS["sigmoid, shared, tight"]
    got = apply(tight, cached=True)
    same(got, apply(dataclasses.replace(tight, dispatch=Dropless())), times=0)


def test_no_token_sees_later_ones_and_none_sees_padding():
    config = KINDS["sigmoid, shared, tight"]
    y, aux, _, _ = apply(config)
    other = np.random.default_rng(5).standard_normal(X.shape).astype(np.float32)
    later = apply(config, x=np.where(np.arange(T)[:, None] < 7, X, other))[0]
    np.testing.assert_array_equal(later[:, :7], y[:, :7])
    assert (later[:, 7:] != y[:, 7:]).any()
    padded = apply(config, x=np.where(REAL[..., None], X, other))
    np.testing.assert_array_equal(padded[0][REAL], y[REAL])
    for name, value in aux.items():
        np.testing.assert_array_equal(padded[1][name], value)
