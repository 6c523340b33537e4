"""Attention over rows that devices share equals the formula in float64, and says only what it must.

Shapes: B batch, T length, K kv heads, G query heads for each, H head dim, C devices of a row.
"""

import functools
import itertools
import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_parts
import toy
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lm import gradients, objectives, sharding, train
from lm.nn import attend, blockwise, ring
from lm.nn.blockwise import Mask, Tokens

B, T, K, G, H = 4, 64, 2, 3, 8
HOWS = ("ring", "gather")
MASKS = {
    "causal": {},
    "window": {"window": 11},
    "window of one": {"window": 1},
    "capped": {"softcap": 0.7},
    "all in a window, capped": {"causal": False, "window": 30, "softcap": 2.0},
}


def layout(**sizes):
    """The layout of a mesh with any axes, those that configs refuse included."""
    shape = [sizes.get(axis, 1) for axis in sharding.AXES]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Explicit,) * len(shape))
    return sharding.Layout(mesh, sharding.Rules(), "cpu")


def ids(packed=True):
    """Rows of documents whose positions restart; the first is one, the last ends in padding."""
    segments = np.sort(np.random.default_rng(2).integers(1, 5, (B, T)), 1)
    segments[0] = 1
    segments[-1, -T // 4 :] = 0
    segments = segments if packed else np.ones_like(segments)
    return [toy.restart(segments), segments.astype(np.int32)]


def arrays():
    """Returns q, k, v and the cotangents of the output and the log-sum-exp."""
    rng = np.random.default_rng(1)
    q, kv, lse = (B, T, K, G, H), (B, T, K, H), (B, K, G, T)
    return [rng.standard_normal(s).astype(np.float32) for s in (q, kv, kv, q, lse)]


def outputs_and_gradients(f, q, k, v, g, g_lse, *ids):
    """Returns out, lse, dq, dk, dv of f(q, k, v, tokens) -> (out, lse)."""
    out, vjp = jax.vjp(lambda *a: f(*a, Tokens(*ids)), q, k, v)
    return *out, *vjp((g, g_lse))


@functools.cache
def formula(name, packed=True):
    mask = Mask(scale=H**-0.5, **MASKS[name])
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        f = lambda q, k, v, t: reference_parts.attention(mask, q, k, v, t, t)  # noqa: E731
        wide = [x.astype(np.float64) for x in arrays()]
        run = jax.jit(functools.partial(outputs_and_gradients, f))
        return [np.asarray(x) for x in run(*wide, *ids(packed))]


def check(got, want):
    """Out, lse, dq, dk, dv are each right to a few rounding errors, in norm."""
    for name, a, b in zip(["out", "lse", "dq", "dk", "dv"], got, want, strict=True):
        assert not np.isinf(b).any()  # every token sees itself
        assert toy.distance(a, b) <= 8 * toy.EPS * (np.linalg.norm(b) + 1), name


def ordered(x, shards, axis=1):
    return np.take(x, sharding.order(T, shards), axis)


def restored(x, shards, axis=1):
    return np.take(np.asarray(x), np.argsort(sharding.order(T, shards)), axis)


LENGTH_AXES = [1, 3, 1, 1, 1]  # of out, lse, dq, dk, dv


def shared(how, mask, block):
    """The function from arrays in the order of their mesh to `gradients`."""

    def f(q, k, v, tokens):
        return ring.attention(how, mask, block, q, k, v, tokens, tokens)

    return functools.partial(outputs_and_gradients, f)


def placed(on, lead=()):
    """Returns all arguments on the devices; `lead` axes of the batch are in front of it."""
    C = on.mesh.shape["seq"]
    heads, row, rest = (
        ("kv_heads", None),
        ("batch", "length"),
        [on.mesh.shape[a] for a in lead],
    )
    with sharding.use(on):
        specs = [
            sharding.spec(*row, *heads, None),
            *[sharding.spec(*row, *heads)] * 2,
            sharding.spec(*row, *heads, None),
            sharding.spec("batch", *heads, "length"),
            *[sharding.spec(*row)] * 2,
        ]
    put = []
    for x, spec, axis in zip(
        [*arrays(), *ids()], specs, [1, 1, 1, 1, 3, 1, 1], strict=True
    ):
        x = ordered(x, C, axis).reshape(*rest, -1, *x.shape[1:])
        rows = [a for a in sharding.names(spec[0]) if a not in lead]
        spec = P(*lead, tuple(rows) or None, *spec[1:])
        put.append(jax.device_put(x, sharding.shard(on, spec)))
    return put


def compiled(on, how, mask, block, lead=()):
    """Returns the compiled gradient under a vmap for each axis of `lead`, and its arguments."""
    run = shared(how, mask, block)
    put = placed(on, lead)
    inside = sharding.Layout(on.mesh, on.rules, on.platform, frozenset(lead))
    with sharding.use(inside):
        for _ in lead:
            run = jax.vmap(run)
        return jax.jit(run).lower(*put).compile(), put


def results(on, how, mask, block, lead=()):
    run, put = compiled(on, how, mask, block, lead)
    C = on.mesh.shape["seq"]
    flat = [np.asarray(x).reshape(-1, *x.shape[1 + len(lead) :]) for x in run(*put)]
    return [restored(x, C, axis) for x, axis in zip(flat, LENGTH_AXES, strict=True)]


CASES = [
    *[(name, 8, 4, how) for name in MASKS for how in HOWS],
    *[("window", C, T // C // 2, how) for C in (2, 4) for how in HOWS],
    ("capped", 4, 16, "ring"),  # one block a device: nothing is skipped within a share
]


@pytest.mark.parametrize(("name", "C", "block", "how"), CASES)
def test_equals_the_formula_with_gradients(name, C, block, how):
    """Packed rows, grouped heads; the log-sum-exp has a gradient too."""
    mask = Mask(scale=H**-0.5, **MASKS[name])
    check(results(layout(seq=C), how, mask, block), formula(name))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("lead", [("data",), ("pipe", "data")], ids="-".join)
def test_equals_the_formula_under_vmaps_over_replicas_and_stages(lead, how):
    """With heads over tensor, or rows over fsdp, besides."""
    other = {"tensor": 2} if len(lead) == 1 else {"fsdp": 1}
    on = layout(**dict.fromkeys(lead, 2), seq=2, **other)
    mask = Mask(scale=H**-0.5, **MASKS["window"])
    check(results(on, how, mask, 16, lead), formula("window"))


# What it says between devices, and what it holds.


def said(on, how, forward=False, lead=()):
    """Returns the collectives of the gradient, or of the forward alone."""
    mask = Mask(scale=1.0)
    if forward:
        f = functools.partial(ring.attention, how, mask, 4)
        q, k, v, _, _, *tokens = placed(on)
        with sharding.use(on):
            tokens = Tokens(*tokens)
            text = jax.jit(f).lower(q, k, v, tokens, tokens).compile().as_text()
    else:
        text = compiled(on, how, mask, 4, lead)[0].as_text()
    return hlo.collectives(text, on.mesh)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_a_ring_holds_permutes_only_and_its_program_does_not_grow(forward):
    found = [said(layout(seq=C), "ring", forward) for C in (4, 8)]
    for some in found:
        assert {(c.kind, c.axes) for c in some} == {
            ("collective-permute", frozenset({"seq"}))
        }
    # Four arrays forward; again in the backward, once before its loop, and two of gradients, which
    # go on alone after it, and home.
    assert len(found[0]) == len(found[1]) == (4 if forward else 4 + 4 + 6 + 2 + 2)


def test_under_a_vmap_the_ring_stays_in_its_replica():
    found = said(layout(data=2, seq=2, tensor=2), "ring", lead=("data",))
    assert {(c.kind, c.axes) for c in found} == {
        ("collective-permute", frozenset({"seq"}))
    }


def test_gathering_gathers_twice_and_scatters_the_gradient():
    found = said(layout(seq=8), "gather", forward=True)
    assert {c.kind for c in found} == {"all-gather"}
    kinds = {c.kind for c in said(layout(seq=8), "gather")}
    assert kinds == {"all-gather", "reduce-scatter"}


LONG = 4096


@functools.cache
def of_a_long_row(C, *sets):
    """The compiled gradient of the model on one row of 4096 tokens, in blocks of 32."""
    prog = toy.program(
        f"data.length={LONG}", f"mesh.seq={C}", "train.batch_size=1", "mesh.data=1",
        "model.attention.context=ring", "objective.chunk=32", *sets,
    )  # fmt: skip

    def run(params, batch):
        return gradients.of(prog, params, batch, jnp.int32(0), jnp.float32(LONG))

    batch = toy.place(prog, toy.batch(rows=1, length=LONG))
    with pytest.MonkeyPatch.context() as patch, sharding.use(prog.layout):
        patch.setattr(attend.Case, "block", lambda case: 32)
        return jax.jit(run).lower(toy.start(prog, noise=0.1).params, batch).compile()


def test_memory_of_the_gradient_falls_with_the_devices():
    """Of temporaries; a little stays, which is of weights and blocks."""
    sizes = [
        of_a_long_row(C).memory_analysis().temp_size_in_bytes for C in (1, 2, 4, 8)
    ]
    for one, half in itertools.pairwise(sizes[1:]):
        assert half < 0.6 * one, sizes


@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_nothing_has_two_dimensions_of_the_length(remat):
    """A device has 512 tokens of 8 x 512."""
    text = of_a_long_row(8, f"model.remat={remat}").as_text()
    shapes = [
        [int(n) for n in s.split(",")] for s in re.findall(r"\[(\d+(?:,\d+)+)\]", text)
    ]
    assert max(sorted(s)[-1] for s in shapes) >= 512
    assert max(sorted(s)[-2] for s in shapes) < 512


def test_remat_of_all_but_attention_does_not_run_the_ring_again():
    mesh = layout(seq=8).mesh
    counts = {}
    for remat in ("none", "attention", "full"):
        found = hlo.collectives(
            of_a_long_row(8, f"model.remat={remat}").as_text(), mesh
        )
        counts[remat] = sum(c.kind == "collective-permute" for c in found)
    assert counts["none"] == counts["attention"] < counts["full"]


# Which blocks are computed.


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shards", [1, 4])
def test_no_block_that_sees_something_is_skipped(name, shards):
    mask = Mask(scale=1.0, ordered=shards == 1, **MASKS[name])
    tokens = Tokens(*(jnp.asarray(ordered(x, shards)) for x in ids()))
    seen = np.asarray(blockwise.visible(mask, tokens, tokens)).any(0)
    seen = seen.reshape(T // 8, 8, T // 8, 8).any((1, 3))
    needed = np.asarray(blockwise.needed(mask, 8, tokens, tokens))
    assert not (seen & ~needed).any()
    assert needed.sum() < needed.size  # and some are


@pytest.mark.parametrize("C", [2, 4, 8])
def test_every_device_computes_as_many_blocks(C):
    """Of a causal row; in the order of the text the last device would compute C times as many."""
    mask, block = Mask(scale=1.0, ordered=False), T // C // 2

    def counts(order):
        row = Tokens(jnp.asarray(order[None]), jnp.ones((1, T), jnp.int32))
        needed = np.asarray(blockwise.needed(mask, block, row, row))
        return needed.reshape(C, -1).sum(1).tolist()

    assert counts(sharding.order(T, C)) == [2 * C + 1] * C
    assert counts(np.arange(T)) == [4 * c + 3 for c in range(C)]


def test_each_device_has_an_early_and_a_late_chunk():
    want = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert sharding.order(16, 4).reshape(4, 4).tolist() == want
    assert sharding.order(16, 1).tolist() == list(range(16))


# How it is chosen, and refused.


def test_auto_gathers_short_rows_and_sends_long_ones_round():
    case = functools.partial(
        attend.Case, platform="gpu", head_dim=64, dtype="bfloat16", packed=True,
        mask=Mask(scale=1.0), shards=8,
    )  # fmt: skip
    short, long = case(queries=8192, keys=8192), case(queries=16384, keys=16384)
    assert [c.choose("auto") for c in (short, long)] == ["blockwise"] * 2
    assert [c.share("auto") for c in (short, long)] == ["gather", "ring"]
    assert [short.share("ring"), long.share("gather")] == ["ring", "gather"]
    assert [short.block(), case(queries=512, keys=512).block()] == [512, 32]
    assert case(queries=64, keys=64).block() == 8  # a share so short is one block
    for name in ("einsum", "cudnn", "splash"):
        with toy.refused(
            f"model.attention.implementation={name}: it needs whole rows",
            "mesh.seq=8",
            "use auto (which takes blockwise here)",
        ):
            short.choose(name)
    prime = 8 * 2 * 1031  # no block divides its chunks
    with toy.refused("data.length=16496", "no block of 16", "multiple of 256"):
        case(queries=prime, keys=prime).choose("auto")


def test_a_length_that_does_not_split_is_refused_with_the_nearest_that_do():
    words = ("data.length=20 is not divisible by 16", "seq 8", "16 or 32")
    with toy.refused(*words):
        toy.program("mesh.seq=8", "data.length=20")
    with toy.refused("data.length=20", "by 8 (seq 2 x tensor 4", "16 or 24"):
        toy.program(
            *("mesh.seq=2", "mesh.tensor=4", "mesh.sequence_parallel=true"),
            *("data.length=20", "mesh.data=1"),
        )


# The model.


@pytest.mark.parametrize("context", HOWS)
def test_rows_of_one_segment_are_split_too(context):
    """`data.isolate=false` promises positions in order, which the devices' order breaks."""
    host = toy.batch()
    host["segments"] = np.ones_like(host["segments"])
    host["positions"] = toy.restart(host["segments"])
    values = []
    for mesh in (
        [],
        ["mesh.seq=4", "mesh.fsdp=2", f"model.attention.context={context}"],
    ):
        prog = toy.program("data.isolate=false", *mesh)
        params = toy.start(prog, noise=0.1).params
        sums = train.make_eval_step(prog)(params, toy.place(prog, host))
        values.append(float(sums["nll"]))
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_hidden_states_of_a_split_row_are_those_of_one_device():
    """Bytes and weights are counted once, and tokens keep their own states."""
    host = toy.batch()
    found = []
    for mesh in ([], ["mesh.data=2", "mesh.seq=2", "mesh.tensor=2"]):
        prog = toy.program(*mesh)
        params = toy.start(prog, noise=0.2).params
        found.append(toy.hidden(prog)(params, host)[0])
    assert toy.distance(found[1], found[0]) < 30 * toy.EPS * np.linalg.norm(found[0])


def test_scores_of_a_batch_are_sums_over_all_shards():
    prog = toy.program("mesh.seq=8")
    host = toy.batch()
    sums = train.make_eval_step(prog)(toy.start(prog).params, toy.place(prog, host))
    assert float(sums["tokens"]) == host["weights"].sum()
    assert int(sums["bytes"]) == host["bytes"].sum()
    bits = objectives.bits_per_byte(float(sums["nll"]), float(sums["bytes"]))
    assert np.isfinite(bits) and bits > 0
