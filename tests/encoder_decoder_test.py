"""Encoder-decoders: who sees whom, meshes, decoding, and what cannot work."""

import dataclasses
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
from lm.models.encoder_decoder import EncoderDecoder
from lm.nn import attend, quadratic
from lm.nn.relative import Relative, buckets

SIZES = [
    *("objective=Seq2Seq", "objective.target_length=12", "data.packing=documents"),
    *(
        "model=EncoderDecoder",
        "model.encoder_layers=3",
        "model.attention.qk_norm=false",
    ),
]
KINDS = {
    # T5 v1.1, with so few buckets that far distances share the last one.
    "t5": [
        *(*SIZES, "model.attention.scale=1", "model.ffn.activation=geglu"),
        *("model.positions.buckets=8", "model.positions.distance=9", "model.tied=false"),
        *("model.start=0", "model.dropout=0.1"),
    ],
    # The Transformer of 2017.
    "2017": [
        *(*SIZES, "model.positions=Sinusoidal", "model.norms=post"),
        *("model.norm=LayerNorm", "model.ffn.activation=relu", "model.ffn.bias=true"),
        *("model.embed_scale=5.656854249492381", "objective.label_smoothing=0.1"),
        *("model.attention.bias=true", "model.attention.out_bias=true"),
        *("model.head_scale=0.5", "model.head_shift=true"),
    ],
}  # fmt: skip
MESHES = {
    "t5": [
        "data 2 x fsdp 2 x tensor 2",
        "data 4 x tensor 2, zero1",
        "data 2 x seq 2 x tensor 2",
    ],
    "2017": ["data 2 x tensor 4, sequence", "pipe 2 x data 2 x fsdp 2, gpipe"],
}


@functools.cache
def program(kind):
    prog = toy.program(*KINDS[kind])
    return prog, toy.start(prog, noise=0.3).params


@functools.cache
def reader(kind):
    """Returns the compiled function from a batch to the hidden states of what is written."""
    prog, params = program(kind)
    run = jax.jit(lambda p, host: prog.model(p).read(host, None, prog.packed)[0])

    def call(host):
        with sharding.use(prog.layout):
            return np.asarray(run(params, toy.place(prog, host)))

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_sees_its_own_text_and_what_was_read_for_it(kind):
    host, run = toy.pairs(), reader(kind)
    before, rows = run(host), np.arange(toy.ROWS)

    def moved(name, where):
        ids = host[name].copy()
        ids[rows, where] = (ids[rows, where] + 1) % 257
        return (run({**host, name: ids}) != before).any(-1)

    second = [np.flatnonzero(row == 2) for row in host["segments"]]
    middle = np.array([s[len(s) // 2] if len(s) > 1 else 0 for s in second])
    later = np.arange(12) >= middle[:, None]
    there = np.array([len(s) > 1 for s in second])[:, None]  # not the beginning
    assert there.sum() > 3
    mine = (host["segments"] == 2) & later & there
    got = moved("tokens", middle)
    np.testing.assert_array_equal(got[there[:, 0]], mine[there[:, 0]])
    # What is read is seen whole, its end as well as its beginning.
    ends = [np.flatnonzero(row == 1)[-1] for row in host["input_segments"]]
    np.testing.assert_array_equal(moved("inputs", ends), host["segments"] == 1)


@pytest.mark.parametrize("kind", [pytest.param("2017", marks=pytest.mark.slow), "t5"])
def test_every_mesh_has_the_loss_and_gradient_of_float64(kind):
    """With dropout in both stacks, packed pairs, and rows without anything to look at; in
    microbatches, with layers that are unrolled and computed again."""
    for mesh in MESHES[kind]:
        other = ["train.accumulate=2", "model.scan=false", "model.remat=full"]
        more = other if "zero1" in mesh else []
        prog = toy.program(*KINDS[kind], *toy.MESHES[mesh], *more)
        reference.agrees(prog, toy.pairs(), loss=2e-6, ulps=32, floor=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_the_logits_are_those_of_the_row(kind):
    """Texts of several lengths are read flush right; what was read is looked at by its cache."""
    prog, params = program(kind)
    T, M, lengths = 8, 12, np.array([8, 3, 1, 5])
    rng = np.random.default_rng(0)
    read, ids = (rng.integers(0, toy.VOCAB, (4, n)).astype(np.int32) for n in (T, M))
    S = generate.slots(1, M)

    @jax.jit
    def both(params):
        model = prog.model(params)
        there = generate.cache_tokens(jnp.asarray(lengths), T, T)
        source = model.encode(jnp.asarray(read), there)
        cached = generate.cache_tokens(jnp.ones(4, jnp.int32), 1, S)
        cache, found = model.empty_cache(4, S, source), []
        for m in range(M):
            given = (
                jnp.asarray(ids[:, m : m + 1]),
                jnp.int32(m),
                cached,
                cache,
                source,
            )
            logits, cache = generate.advance(model, *given)
            found.append(logits)
        alone = {"inputs": np.zeros_like(read), "tokens": ids}
        for b, n in enumerate(lengths):  # the same flush left
            alone["inputs"][b, :n] = read[b, T - n :]
        segments = (np.arange(T) < lengths[:, None]).astype(np.int32)
        alone |= {"input_segments": segments, "segments": np.ones_like(ids)}
        alone["input_positions"] = np.arange(T)[None] * segments
        alone["positions"] = np.arange(M)[None] + np.zeros_like(ids)
        x_BTD, _ = model.read(jax.tree.map(jnp.asarray, alone), None, True)
        return jnp.stack(found, 1), model.logits(x_BTD)[..., : toy.VOCAB]

    with sharding.use(prog.layout):
        stepwise, whole = both(params)
    np.testing.assert_allclose(stepwise, whole, rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_no_neighbour_and_no_mesh():
    chosen = Generate(tokens=6, temperature=1.0, top_p=None)

    def sampled(prompts, *sets):
        prog = toy.program(*KINDS["t5"], *sets)
        params = toy.start(prog, noise=0.3).params
        return generate.texts(
            prog, params, ByteTokenizer(), prompts, chosen, pytest.fail
        )

    together = sampled(["a", "of the"])
    assert [sampled(["a"])[0], sampled(["of the"])[0]] == together
    assert together[0] != together[1]
    assert (
        sampled(["a", "of the"], *toy.MESHES["data 2 x fsdp 2 x tensor 2"]) == together
    )


def test_sentinels_are_shown_by_their_numbers():
    text = np.array([258, 104, 105, 257, 97, 256, 99])
    start = np.array([ByteTokenizer.eot])
    assert generate._decode(ByteTokenizer(), start, text) == "<258>hi<257>a"


def test_buckets_are_those_of_the_paper():
    """Half of a direction's are of one distance; the last begins at most at `distance`."""
    c = Relative(buckets=32, distance=128)
    past, both = (buckets(c, causal=causal) for causal in (True, False))
    assert past[128:].max() == 0 and past[0] == 31
    np.testing.assert_array_equal(past[128 - 16 : 128], np.arange(16, 0, -1))
    np.testing.assert_array_equal(both[128 - 8 : 129], np.arange(8, -1, -1))
    np.testing.assert_array_equal(both[129:], both[127::-1] + 16)
    for found in (past[128::-1], both[128::-1]):
        assert (np.diff(found) >= 0).all() and (np.diff(found) <= 1).all()


def test_the_bias_of_scores_has_its_gradient():
    """Of a single bias for all rows, or one for each, in rows that are cut in two."""
    rng = np.random.default_rng(0)
    q, k, v, g = jnp.asarray(rng.normal(size=(4, 2, 8, 2, 1, 4)), jnp.float32)
    tokens = generate.cache_tokens(jnp.array([8, 5]), 8, 8)
    mask = EncoderDecoder.Config().attention.mask(4)

    def plain(q, k, v, bias):
        s = jnp.einsum("btkgh,bskh->bkgts", q, k[:, :, :, 0]) * mask.scale + bias
        seen = tokens.segments[:, :, None] == tokens.segments[:, None]
        seen &= tokens.positions[:, :, None] >= tokens.positions[:, None]
        p = jax.nn.softmax(jnp.where(seen[:, None, None], s, -1e30))
        return (jnp.einsum("bkgts,bskh->btkgh", p, v[:, :, :, 0]) * g).sum()

    def ours(q, k, v, bias):
        given = (q, k[:, :, :, 0], v[:, :, :, 0], tokens, tokens, bias)
        return (quadratic.attention(mask, True, *given)[0] * g).sum()

    for R in (1, 2):
        bias = jnp.asarray(rng.normal(size=(R, 2, 1, 8, 8)), jnp.float32)
        wanted = jax.grad(plain, (0, 1, 2, 3))(q, k, v, bias)
        with sharding.use(toy.layout(toy.BASE.mesh)):
            found = jax.grad(ours, (0, 1, 2, 3))(q, k, v, bias)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_scores_of_distances_are_formed_by_einsum_alone():
    case = attend.Case(
        platform="tpu", queries=256, keys=256, head_dim=64, dtype="bfloat16",
        packed=False, mask=EncoderDecoder.Config().attention.mask(64), bias=True,
    )  # fmt: skip
    assert case.choose("auto") == "einsum"
    for asked in ("blockwise", "cudnn", "splash"):
        with toy.refused(f"implementation={asked}", "Relative", "takes einsum here"):
            case.choose(asked)
    split = dataclasses.replace(case, shards=2)
    assert split.how("auto", "auto") == "einsum by gather"
    with toy.refused("context=ring", "Relative", "gather or auto"):
        split.how("auto", "ring")


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["objective=Causal"], ["objective=Causal does not go", "Seq2Seq or Span"]),
        (["mesh.seq=4"], ["targets of 12 tokens", "8 (mesh.seq=4)", "mesh.seq=1"]),
        (["mesh.pipe=2"], ["schedule=1f1b", "two stacks", "schedule=gpipe"]),
        (
            ["mesh.pipe=2", "pipeline.schedule=gpipe", "model.encoder_layers=1"],
            ["model.encoder_layers=1 are fewer", "mesh.pipe=2"],
        ),
        (
            [*toy.MESHES["data 2 x tensor 4, sequence"], "objective.target_length=10"],
            ["targets of 10 tokens", "mesh.tensor=4", "sequence_parallel=false"],
        ),
        (["model.attention.causal=false"], ["attention.causal=false", "=true"]),
        (["model.attention.sinks=true"], ["attention.sinks=true", "sinks=false"]),
        (["model.attention.softcap=3"], ["attention.softcap=3.0", "softcap=none"]),
        (["model.positions.buckets=6"], ["buckets=6", "multiple of 4"]),
        (["model.positions.distance=4"], ["distance=4", "more than buckets / 2 = 4"]),
        (["model.start=257"], ["model.start=257", "vocab_size=257"]),
        (["model.encoder_layers=0"], ["model.encoder_layers=0"]),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(sets, words):
    with toy.refused(*words):
        toy.program(*KINDS["t5"], *sets)
