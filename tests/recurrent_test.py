"""Recurrent models: documents apart, decoding, meshes, and what cannot work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toy

from lm import generate, sharding
from lm.data.tokenizer import ByteTokenizer
from lm.experiment import Generate
from lm.nn import recurrent

KINDS = {
    "lstm": ["model=Recurrent", "model.mixer.hidden=24", "model.norms=both"],
    "gru": ["model=Recurrent", "model.mixer=Gru", "model.ffn=Mlp", "model.tied=false"],
}
MESHES = {
    "lstm": ["data 2 x fsdp 2 x tensor 2", "pipe 2 x data 2 x tensor 2"],
    "gru": ["data 2 x tensor 4, sequence"],
}


@functools.cache
def program(kind):
    prog = toy.program(*KINDS[kind])
    return prog, toy.start(prog, noise=0.3).params


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_what_it_is_alone(kind):
    """Each document of a row has the states that it has at the beginning of a row of its own."""
    prog, params = program(kind)
    host = toy.batch()
    run = toy.hidden(prog)
    packed, _ = run(params, host)
    alone = {k: np.zeros_like(v) for k, v in host.items()}
    second = np.argmax(host["segments"] == 2, 1)
    for b, start in enumerate(second):
        count = int((host["segments"][b] == 2).sum())
        alone["tokens"][b, :count] = host["tokens"][b, start : start + count]
        alone["segments"][b, :count] = 1
    states, _ = run(params, {**host, **alone, "positions": host["positions"]})
    counts = (host["segments"] == 2).sum(1)
    assert (counts > 2).sum() > 3
    for b, (start, count) in enumerate(zip(second, counts, strict=True)):
        got, want = packed[b, start : start + count], states[b, :count]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_the_logits_are_those_of_the_row(kind):
    """Prompts of several lengths are read at once, then each token moves the state on."""
    prog, params = program(kind)
    T, M, lengths = 8, 5, np.array([8, 3, 1, 5])
    ids = np.random.default_rng(0).integers(0, toy.VOCAB, (4, T + M)).astype(np.int32)
    S = generate.slots(T, M)

    @jax.jit
    def both(params):
        model = prog.model(params)
        cached = generate.cache_tokens(jnp.asarray(lengths), T, S)
        cache, found = model.empty_cache(4, S), []
        for at, count in [(0, T), *((T + m, 1) for m in range(M - 1))]:
            here = jnp.asarray(ids[:, at : at + count])
            logits, cache = generate.advance(model, here, jnp.int32(at), cached, cache)
            found.append(logits)
        tokens = jax.tree.map(lambda a: a[:, : T + M], cached)
        x_BTD, _, _ = model(jnp.asarray(ids), tokens)
        return jnp.stack(found, 1), model.logits(x_BTD)[..., : toy.VOCAB]

    with sharding.use(prog.layout):
        stepwise, whole = both(params)
    np.testing.assert_allclose(stepwise, whole[:, T - 1 : -1], rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_no_neighbour():
    prog, params = program("lstm")
    chosen = Generate(tokens=6, temperature=1.0, top_p=None)
    sampled = functools.partial(
        generate.texts, prog, params, ByteTokenizer(), config=chosen, report=pytest.fail
    )
    together = sampled(["a", "of the"])
    assert [sampled(["a"])[0], sampled(["of the"])[0]] == together
    assert together[0] != together[1]


@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_every_mesh_has_the_loss_and_gradient_of_float64(kind):
    for mesh in MESHES[kind]:
        prog = toy.program(*KINDS[kind], *toy.MESHES[mesh])
        reference.agrees(prog, toy.batch(), loss=1e-6, ulps=16, floor=1e-8)


def test_the_recurrent_matrix_has_one_product_a_row():
    """What the scan of the backward carries is no matrix, else every step would add one up."""
    prog, _ = program("lstm")
    H = prog.experiment.model.mixer.hidden
    p, w = jnp.ones((2, 16, 4, H)), jnp.ones((4, H, H))
    state = (jnp.zeros((2, H)),) * 2
    cell = functools.partial(recurrent.Lstm.cell, recurrent.Lstm.Config())

    def total(p, w):
        return recurrent.recur(cell, None, p, w, jnp.ones((2, 16)), state)[0].sum()

    with sharding.use(prog.layout):
        jaxpr = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(p, w))
    assert jaxpr.count("scan[") == 2
    assert f"f32[16,{H},4,{H}]" not in jaxpr
    carried = [line for line in jaxpr.splitlines() if f"f32[{H},4,{H}]" in line]
    assert not any("add_any" in line for line in carried), carried


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_gradient_goes_back_one_window_and_the_state_goes_on(kind):
    """As if each window were a row of its own that is given the state of the one before."""
    prog, _ = program(kind)
    made = prog.experiment.model.mixer
    mixer, W = {"lstm": recurrent.Lstm, "gru": recurrent.Gru}[kind], 4
    H = made.width(prog.experiment.model.dim)
    cell = functools.partial(mixer.cell, made)
    random = np.random.default_rng(0)
    p = jnp.asarray(random.normal(size=(2, 10, mixer.parts, H)), jnp.float32)
    w = jnp.asarray(random.normal(size=(mixer.gates, H, H)) / H**0.5, jnp.float32)
    kept = jnp.ones((2, 10)).at[1, 6].set(0)  # a document begins within a window
    weights = jnp.asarray(random.normal(size=(2, 10, H)), jnp.float32)
    start = tuple(jnp.full((2, H), 0.1) for _ in range(mixer.states))

    def total(p, w, window):
        return (recurrent.recur(cell, window, p, w, kept, start)[0] * weights).sum()

    def by_windows(p, w):
        state, found = start, 0.0
        for at in range(0, 10, W):
            here = slice(at, at + W)
            state = jax.lax.stop_gradient(state)
            ys, state = recurrent.recur(cell, None, p[:, here], w, kept[:, here], state)
            found += (ys * weights[:, here]).sum()
        return found

    with sharding.use(prog.layout):
        grads = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
        cut, whole, one = (grads(p, w, window) for window in (W, None, 10))
        expected = jax.jit(jax.grad(by_windows, (0, 1)))(p, w)
        value = total(p, w, W), total(p, w, None)
    np.testing.assert_array_equal(*value)
    for a, b, c, d in zip(cut, expected, whole, one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(c, d)
        assert np.abs(a - c).max() > 1e-3


def test_what_cannot_work_is_refused():
    with toy.refused("model.mixer.window=17: rows have data.length=16", "window=16"):
        toy.experiment("model=Recurrent", "model.mixer.window=17", "data.length=16")
    with toy.refused("model.mixer.window=0", "1 or more, or none"):
        toy.experiment("model=Recurrent", "model.mixer.window=0")
    with toy.refused("mesh.seq=2", "mesh.data, fsdp or tensor"):
        toy.program("model=Recurrent", "mesh.seq=2")
    with toy.refused("model.mixer.hidden=0", "1 or more"):
        toy.experiment("model=Recurrent", "model.mixer.hidden=0")
