"""Every way to attend equals the T x S formula in float64, gradients too; refusals name the fix.

Shapes: B batch, T queries, S keys, K kv heads, G query heads for each, H head dim.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_parts
import toy

from lm import sharding
from lm.config import ConfigError
from lm.nn import attend, blockwise, quadratic
from lm.nn.attention import Attention
from lm.nn.blockwise import Mask, Tokens

B, T, K, H = 3, 24, 2, 8
MASKS = {
    "causal": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window as wide as the row": {"window": T},
    "soft cap": {"softcap": 0.7},
    "all": {"causal": False},
    "all in a window, capped": {"causal": False, "window": 7, "softcap": 2.0},
    "capped window": {"window": 9, "softcap": 1.5},
}
CASES = [(name, how) for name in MASKS for how in ("einsum", "blocks of 8")] + [
    ("capped window", "blocks of 4"),
    ("causal", "one block"),
]
BLOCKS = {"blocks of 4": 4, "blocks of 8": 8, "one block": T}


def packed_tokens(seed=2, length=T):
    """Rows of documents whose positions restart; the first is one, the last ends in padding."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (B, length)), 1)
    segments[0] = 1
    segments[-1, -length // 4 :] = 0
    positions = toy.restart(segments)
    return Tokens(jnp.asarray(positions), jnp.asarray(segments, jnp.int32))


def inputs(G=3, length=T, keys=T, dtype=jnp.float32):
    """Returns q, k, v and the cotangents of the output and the log-sum-exp."""
    rng = np.random.default_rng(1)
    q, k, v = (B, length, K, G, H), (B, keys, K, H), (B, keys, K, H)
    q, k, v, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in (q, k, v, q))
    g_lse = jnp.asarray(rng.standard_normal((B, K, G, length)), jnp.float32)
    return (q, k, v), (g, g_lse)


def everything(f, arrays, cotangents):
    """Returns out, lse, dq, dk, dv of f(q, k, v) -> (out, lse), as float64."""

    @jax.jit
    def run(arrays, cotangents):
        out, vjp = jax.vjp(f, *arrays)
        return *out, *vjp(cotangents)

    return [np.asarray(x, np.float64) for x in run(arrays, cotangents)]


def formula(mask, arrays, cotangents, q_tokens, kv_tokens):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, cotangents))
        f = lambda *a: reference_parts.attention(mask, *a, q_tokens, kv_tokens)  # noqa: E731
        return everything(f, *wide)


def check(got, want, eps=toy.EPS):
    """Out, lse, dq, dk, dv are each right to a few rounding errors, in norm."""
    for name, a, b in zip(["out", "lse", "dq", "dk", "dv"], got, want, strict=True):
        b = np.where(np.isinf(b), a, b)  # no key is seen: any very low number will do
        assert toy.distance(a, b) <= 8 * eps * (np.linalg.norm(b) + 1), name


def implementation(how, mask, q_tokens, kv_tokens):
    if how == "einsum":
        return lambda *a: quadratic.attention(mask, True, *a, q_tokens, kv_tokens)
    return lambda *a: blockwise.attention(mask, BLOCKS[how], *a, q_tokens, kv_tokens)


@pytest.fixture(autouse=True)
def one_device():
    with sharding.use(toy.layout(toy.BASE.mesh)):
        yield


@functools.cache
def expected(name, G):
    tokens = packed_tokens()
    return formula(Mask(scale=H**-0.5, **MASKS[name]), *inputs(G), tokens, tokens)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_equals_the_formula_with_gradients(name, how):
    """On packed rows with padding; the log-sum-exp has a gradient too."""
    G = 1 if name == "causal" else 3
    tokens = packed_tokens()
    f = implementation(how, Mask(scale=H**-0.5, **MASKS[name]), tokens, tokens)
    check(everything(f, *inputs(G)), expected(name, G))


@pytest.mark.parametrize("how", ["einsum", "blocks of 4"])
def test_queries_at_the_end_of_a_cache(how):
    """T = 8 of S = 24; a query whose segment no key has gives 0, and no NaN in any gradient."""
    mask = Mask(scale=H**-0.5, window=6, softcap=3.0, ordered=False)
    kv_tokens = packed_tokens()
    last = jax.tree.map(lambda x: x[:, 16:], kv_tokens)
    alone = last.segments.at[1].set(9)
    q_tokens = Tokens(last.positions, alone)
    arrays, cotangents = inputs(3, length=8)
    got = everything(implementation(how, mask, q_tokens, kv_tokens), arrays, cotangents)
    check(got, formula(mask, arrays, cotangents, q_tokens, kv_tokens))
    out, lse, dq, dk, dv = got
    assert all(np.isfinite(x).all() for x in got)
    assert not out[1].any() and (lse[1] < -1e29).all()
    assert not dq[1].any() and not dk[1].any() and not dv[1].any()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("G", [1, 3])
def test_a_promise_of_whole_rows_changes_nothing(window, G):
    """`packed=False`, where segments need not be looked at, is the same sum."""
    mask = Mask(scale=H**-0.5, window=window)
    row = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    tokens = Tokens(jnp.asarray(row), jnp.ones((B, T), jnp.int32))
    arrays, cotangents = inputs(G)
    f = lambda *a: quadratic.attention(mask, False, *a, tokens, tokens)  # noqa: E731
    check(
        everything(f, arrays, cotangents),
        formula(mask, arrays, cotangents, tokens, tokens),
    )


@pytest.mark.parametrize("how", ["einsum", "blocks of 8"])
def test_bfloat16_loses_only_what_rounding_its_own_numbers_costs(how):
    mask = Mask(scale=H**-0.5, softcap=3.0)
    tokens = packed_tokens()
    arrays, (g, g_lse) = inputs(3, dtype=jnp.bfloat16)
    got = everything(implementation(how, mask, tokens, tokens), arrays, (g, g_lse))
    want = formula(mask, arrays, (g, g_lse), tokens, tokens)
    check(got, want, eps=float(jnp.finfo(jnp.bfloat16).eps) / 4)


def test_shares_of_the_keys_combine_by_their_log_sum_exp():
    """What a ring over sequence shards does."""
    mask = Mask(scale=H**-0.5, ordered=False)
    tokens = packed_tokens()
    (q, k, v), _ = inputs()
    share = jax.jit(functools.partial(blockwise.attention, mask, 4))
    halves = slice(0, 12), slice(12, 24)
    kv = [jax.tree.map(lambda x, h=h: x[:, h], (k, v, tokens)) for h in halves]
    (o0, s0), (o1, s1) = (share(q, k, v, tokens, t) for k, v, t in kv)
    lse = np.logaddexp(s0, s1)
    a, b = (np.exp(s - lse).transpose(0, 3, 1, 2)[..., None] for s in (s0, s1))
    whole = jax.jit(functools.partial(reference_parts.attention, mask))(
        q, k, v, tokens, tokens
    )
    np.testing.assert_allclose(lse, whole[1], atol=1e-5)
    np.testing.assert_allclose(o0 * a + o1 * b, whole[0], atol=1e-5)


def test_blockwise_never_forms_scores_of_the_whole_row():
    """Neither forward nor backward holds an array with two dimensions of the length."""
    mask, length = Mask(scale=1.0), 1024
    tokens = Tokens(*(jnp.zeros((B, length), jnp.int32),) * 2)
    arrays, cotangents = inputs(1, length, length)

    def text(how):
        f = lambda *a: attend.attend(*a, tokens, tokens, mask, how)  # noqa: E731
        run = jax.jit(lambda a, g: jax.vjp(f, *a)[1](g))
        return run.lower(arrays, cotangents).compile().as_text()

    scores = re.compile(r"\[(\d+,)*(512|1024),1024[],]")  # half of the queries, or all
    assert not scores.search(text("blockwise"))
    assert scores.search(text("einsum"))  # so the search can fail


# How one is chosen.

LONG = attend.Case(
    platform="gpu",
    queries=8192,
    keys=8192,
    head_dim=128,
    dtype="bfloat16",
    packed=False,
    mask=Mask(scale=1.0),
    capability=9.0,
)
CHOICES = [
    ({}, "cudnn"),
    ({"mask": Mask(scale=1.0, window=128)}, "cudnn"),
    ({"packed": True}, "blockwise"),
    ({"dtype": "float32"}, "blockwise"),
    ({"mask": Mask(scale=1.0, softcap=30.0)}, "blockwise"),
    ({"mask": Mask(scale=1.0, causal=False, window=9)}, "blockwise"),
    ({"head_dim": 512}, "blockwise"),
    ({"queries": 1, "mask": Mask(scale=1.0, ordered=False)}, "einsum"),
    ({"queries": 4096, "mask": Mask(scale=1.0, ordered=False)}, "blockwise"),
    ({"queries": 8191, "keys": 8191, "packed": True}, "einsum"),  # a prime: no blocks
    ({"platform": "tpu", "packed": True}, "splash"),
    ({"platform": "tpu", "mask": Mask(scale=1.0, softcap=30.0, window=64)}, "splash"),
    ({"platform": "tpu", "head_dim": 80}, "blockwise"),
    ({"platform": "tpu", "queries": 8256, "keys": 8256}, "blockwise"),
    ({"platform": "cpu"}, "blockwise"),
    ({"platform": "cpu", "queries": 256, "keys": 256}, "einsum"),
]


@pytest.mark.parametrize(("change", "choice"), CHOICES)
def test_auto_takes_the_fastest_that_honours_the_case(change, choice):
    case = dataclasses.replace(LONG, **change)
    assert case.choose("auto") == choice
    assert case.choose(choice) == choice  # and by name the same


REFUSALS = [
    ("cudnn", {"packed": True}, "no segments and rows are packed (data.isolate=false"),
    ("cudnn", {"mask": Mask(scale=1.0, softcap=30.0)}, "no soft cap, here 30"),
    ("cudnn", {"dtype": "float32"}, "not float32"),
    ("cudnn", {"platform": "cpu"}, "needs an NVIDIA GPU, this is cpu"),
    ("cudnn", {"head_dim": 100}, "a multiple of 8, at most 256, not 100"),
    ("cudnn", {"mask": Mask(scale=1.0, ordered=False)}, "no cache"),
    ("cudnn", {"mask": Mask(scale=1.0, causal=False, window=4)}, "causal only"),
    ("splash", {}, "needs a TPU, this is gpu"),
    ("splash", {"platform": "tpu", "queries": 100}, "multiples of 128, not 100, 8192"),
    ("splash", {"platform": "tpu", "head_dim": 80}, "a multiple of 64, not 80"),
    ("blockwise", {"queries": 8191, "keys": 8191}, "share no block of 16 or more"),
]


@pytest.mark.parametrize(("name", "change", "reason"), REFUSALS)
def test_one_asked_for_by_name_is_refused_with_the_reason_and_a_fix(
    name, change, reason
):
    case = dataclasses.replace(LONG, **change)
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        case.choose(name)
    message = str(error.value)
    assert f"model.attention.implementation={name}: " in message
    assert f"use auto (which takes {case.choose('auto')} here)" in message
    assert "\n" not in message


def test_an_old_gpu_gets_no_cudnn():
    old = dataclasses.replace(LONG, capability=7.5)
    assert old.choose("auto") == "blockwise"
    with pytest.raises(ConfigError, match=r"compute capability 8, here it is 7\.5"):
        old.choose("cudnn")


@pytest.mark.parametrize(("queries", "keys", "block"), [
    (8192, 8192, 512), (96, 96, 96), (1536, 1024, 512), (100, 75, 25), (31 * 17, 31 * 17, 31),
    (15, 15, 0), (1, 4096, 0),
])  # fmt: skip
def test_blocks_divide_both_lengths(queries, keys, block):
    assert dataclasses.replace(LONG, queries=queries, keys=keys).block() == block


# Kernels of other backends, as far as a CPU can run them.


@pytest.mark.parametrize("options", [{"window": 33}, {"softcap": 2.0}])
def test_splash_kernel_gets_the_right_arguments(options):
    """Pallas interprets the TPU kernel here: scale, window, soft cap, segments, grouped heads."""
    from jax.experimental.pallas import tpu as pltpu

    rng = np.random.default_rng(0)
    length, N = 128, 4
    q = jnp.asarray(rng.standard_normal((1, length, N, 64)), jnp.float32)
    k, v = (
        jnp.asarray(rng.standard_normal((1, length, 2, 64)), jnp.float32) for _ in "kv"
    )
    segments = jnp.asarray(np.arange(length)[None] // 50 + 1, jnp.int32)
    tokens = Tokens(jnp.asarray(toy.restart(np.asarray(segments))), segments)
    mask = Mask(scale=64**-0.5, **options)
    with pltpu.force_tpu_interpret_mode():
        run = jax.jit(functools.partial(attend._splash, mask))
        out = run(q, k, v, segments, segments)
    grouped = q.reshape(1, length, 2, 2, 64)
    plain = jax.jit(functools.partial(reference_parts.attention, mask))
    want, _ = plain(grouped, k, v, tokens, tokens)
    np.testing.assert_allclose(out, want.reshape(out.shape), atol=2e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_cudnn_gets_the_right_arguments(monkeypatch, window):
    """Its reference in jax takes the same ones: window, scale, and how log-sum-exp is laid out."""
    public = jax.nn.dot_product_attention

    def by_xla(*args, implementation, **options):
        assert implementation == "cudnn"
        return public(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    row = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    tokens = Tokens(jnp.asarray(row), jnp.ones((B, T), jnp.int32))
    mask = Mask(scale=0.3, window=window)
    (q, k, v), _ = inputs()
    out, lse = jax.jit(functools.partial(attend._cudnn, mask))(
        q.reshape(B, T, -1, H), k, v
    )
    plain = jax.jit(functools.partial(reference_parts.attention, mask))
    want, want_lse = plain(q, k, v, tokens, tokens)
    np.testing.assert_allclose(out, want.reshape(out.shape), atol=1e-5)
    np.testing.assert_allclose(lse, want_lse.reshape(lse.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "length", "said"),
    [
        ({"data": 1}, 64, "einsum"),
        ({"data": 1}, 2048, "blockwise"),
        ({"data": 1, "seq": 2}, 2048, "blockwise by gather"),
        ({"data": 1, "seq": 2}, 16384, "blockwise by ring"),
    ],
)
def test_a_run_can_say_how_attention_is_computed(mesh, length, said):
    layout = toy.layout(sharding.MeshConfig(**mesh))
    row = attend.Row(layout=layout, length=length, dtype="float32", packed=True)
    assert Attention.Config().how(row, 64) == said
