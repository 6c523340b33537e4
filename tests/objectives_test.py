"""The chunked loss equals the formula in float64, gradients too, on every mesh, in less memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toy

from lm import objectives, sharding
from lm.objectives import Causal, Head

B, T, D, V, ROWS = 8, 12, 16, 250, 256
PLAIN = Head(vocab=V, softcap=None, chunk=8, z_loss=0.0, smoothing=0.0)
HEADS = {
    "plain": {},
    "soft cap": {"softcap": 1.5},
    "z-loss": {"z_loss": 0.1},
    "smoothing": {"smoothing": 0.2},
    "all": {"softcap": 3.0, "z_loss": 0.05, "smoothing": 0.1},
}
MESHES = {
    "one device": {},
    "tensor 4": {"tensor": 4},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 8": {"fsdp": 8},
}


def inputs(dtype=np.float32, scale=1.0):
    """x, w (its last rows are padding), targets and weights, of which some are 0."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)) * scale, dtype)
    w = rng.standard_normal((ROWS, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.integers(0, 3, (B, T)).astype(np.float32)
    return x, w, targets, weights


def run(head, arrays, layout=None, factor=1.0):
    """Returns factor x loss, nll and the gradients of x and w, on the mesh."""
    layout = layout or toy.layout(toy.BASE.mesh)

    def f(x, w, targets, weights):
        loss, nll = objectives.cross_entropy(head, x, w, targets, weights)
        return factor * loss, nll

    with sharding.use(layout):
        names = [("batch", "length", None), ("vocab", "embed")] + [
            ("batch", "length")
        ] * 2
        put = [
            jax.device_put(a, sharding.shard(layout, sharding.spec(*n)))
            for a, n in zip(arrays, names, strict=True)
        ]
        (loss, nll), (dx, dw) = jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(
            *put
        )
        assert jax.typeof(dw).sharding.spec == sharding.spec("vocab", "embed")
    return loss, nll, dx, dw


@functools.cache
def _formula(head):
    objective = Causal(z_loss=head.z_loss, label_smoothing=head.smoothing)

    def f(x, w, targets, weights):
        z = x @ w[:V].T
        if head.softcap is not None:
            z = head.softcap * jnp.tanh(z / head.softcap)
        nll = reference.token_loss(Causal(), z, targets)
        loss = reference.token_loss(objective, z, targets)
        return (loss * weights).sum(), (nll * weights).sum()

    return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))


def formula(head, x, w, targets, weights):
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (x, w)]
        (loss, nll), (dx, dw) = _formula(head)(*wide, targets, weights)
        return [np.asarray(a) for a in (loss, nll, dx, dw)]


def check(got, want, eps=toy.EPS):
    for name, a, b in zip(["loss", "nll", "dx", "dw"], got, want, strict=True):
        error = toy.distance(np.asarray(a, np.float64), b)
        assert error <= 4 * eps * np.linalg.norm(b), (name, error / np.linalg.norm(b))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("mesh", ["one device", "data 2 x fsdp 2 x tensor 2"])
def test_equals_the_formula_with_gradients(name, mesh):
    head = dataclasses.replace(PLAIN, **HEADS[name])
    layout = toy.layout(sharding.MeshConfig(**{"data": 1, **MESHES[mesh]}))
    got = run(head, inputs(), layout)
    check(got, formula(head, *inputs()))
    assert not np.asarray(got[3])[V:].any()  # rows of padding never move


@pytest.mark.parametrize("mesh", ["tensor 4", "fsdp 8"])
def test_the_mesh_never_changes_it(mesh):
    head = dataclasses.replace(PLAIN, **HEADS["all"])
    layout = toy.layout(sharding.MeshConfig(**{"data": 1, **MESHES[mesh]}))
    check(run(head, inputs(), layout), formula(head, *inputs()))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_any_chunk_is_the_same_sum(chunk):
    """Also one that does not divide the tokens, or is more than there are."""
    head = dataclasses.replace(PLAIN, chunk=chunk)
    check(run(head, inputs()), formula(head, *inputs()))


def test_logits_of_a_thousand_overflow_nothing():
    """Each is rounded by 1000 eps, and so each probability is wrong by so much."""
    arrays = inputs(scale=300.0)
    check(run(PLAIN, arrays), formula(PLAIN, *arrays), eps=1000 * toy.EPS)


def test_the_gradient_follows_what_is_done_to_the_loss():
    """Its factor comes from outside: the gradient computed in the forward is scaled by it."""
    loss, nll, dx, dw = run(PLAIN, inputs(), factor=-0.25)
    want = formula(PLAIN, *inputs())
    check((loss * -4, nll, dx * -4, dw * -4), want)


def test_tokens_of_weight_0_count_for_nothing():
    """Whatever they hold, loss and gradients are bitwise the same, and theirs are 0."""
    x, w, targets, weights = inputs()
    other = weights == 0
    noise = 9 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    changed = (
        np.where(other[..., None], noise, x),
        w,
        np.where(other, 3, targets),
        weights,
    )
    a, b = run(PLAIN, inputs()), run(PLAIN, changed)
    for one, two in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.asarray(a[2])[other].any() and np.asarray(a[2])[~other].any()


def test_bfloat16_activations_cost_only_their_rounding():
    """Logits and sums stay fp32; w is rounded once; the gradient of w is kept in fp32."""
    x, w, targets, weights = inputs(jnp.bfloat16)
    loss, nll, dx, dw = got = run(PLAIN, (x, w, targets, weights))
    assert (loss.dtype, nll.dtype, dx.dtype, dw.dtype) == (
        jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32,
    )  # fmt: skip
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32)
    want = formula(PLAIN, x, rounded, targets, weights)
    np.testing.assert_allclose([loss, nll], want[:2], rtol=1e-6)
    check(got, want, eps=float(jnp.finfo(jnp.bfloat16).eps) / 4)


def test_logits_of_all_tokens_never_exist():
    """Of 2048 tokens x 4096 ids the naive loss holds them all, the chunked one a chunk's."""
    tokens, vocab, chunk = 2048, 4096, 64
    head = dataclasses.replace(PLAIN, vocab=vocab, chunk=chunk)
    shape = lambda *s, dtype=np.float32: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    args = (
        shape(1, tokens, D), shape(vocab, D), shape(1, tokens, dtype=np.int32), shape(1, tokens),
    )  # fmt: skip

    def temporary(f):
        grad = jax.jit(jax.grad(f, (0, 1))).lower(*args).compile()
        return grad.memory_analysis().temp_size_in_bytes

    def naive(x, w, targets, weights):
        return (reference.token_loss(Causal(), x @ w.T, targets) * weights).sum()

    with sharding.use(toy.layout(toy.BASE.mesh)):
        chunked = temporary(lambda *a: objectives.cross_entropy(head, *a)[0])
    weight = 4 * vocab * D
    assert chunked < 4 * (4 * chunk * vocab) + 2 * weight
    assert temporary(naive) > 4 * tokens * vocab


def test_bits_per_byte():
    assert math.isclose(objectives.bits_per_byte(math.log(2) * 80, 10), 8.0)


def test_bad_objectives_are_refused():
    with toy.refused("label_smoothing=1.0"):
        Causal(label_smoothing=1.0)
    with toy.refused("chunk must be 1 or more"):
        Causal(chunk=0)
