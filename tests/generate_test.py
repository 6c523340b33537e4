"""Sampling: the cache changes no logit, and no mesh or neighbour changes a sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax import lax

from lm import config, generate, sampling, sharding, train, trees
from lm.data.loader import Data
from lm.data.tokenizer import Bytes, ByteTokenizer
from lm.experiment import Experiment, Generate, Train
from lm.models.transformer import Transformer
from lm.nn import attend
from lm.nn.attention import Attention
from lm.nn.blockwise import Tokens
from lm.nn.ffn import Mlp
from lm.nn.layers import LayerNorm, Learned
from lm.nn.moe import Dropless, Moe, Sigmoid

CODER = ByteTokenizer()
EOT = CODER.eot
LENGTH = 48  # the context of these models, tokens


def tiny(vocab_size=257, length=LENGTH, **model):
    """An experiment with a model of 2 layers, 16 wide."""
    sizes = {"layers": 2, "dim": 16, "heads": 4, "kv_heads": 2}
    sizes |= {"ffn": Mlp.Config(hidden=24)}
    return Experiment(
        name="tiny",
        model=Transformer.Config(
            vocab_size=vocab_size,
            vocab_multiple=8,
            **{**sizes, **model},
        ),
        data=Data(
            source=("x",),
            length=length,
            **({"tokenizer": Bytes()} if vocab_size == 257 else {}),
        ),
        train=Train(batch_size=8),
    )


def program(experiment, *sets):
    """The program of the experiment, on one device where `sets` name no mesh."""
    experiment = config.override(experiment, sets or ["mesh.data=1"])
    return train.program(experiment, sharding.make_layout(experiment.mesh))


def weights(prog, seed=0, **given):
    """Random weights, so large that logits differ; or those given, and zeros elsewhere.

    Made by numpy: equal on every mesh, and there is nothing to compile.
    """
    rng = np.random.default_rng(seed)

    def value(path, shape):
        if path in given:
            return np.asarray(given[path], np.float32)
        if path.endswith("scale_d"):
            return np.ones(shape, np.float32)
        return rng.normal(0, 0.0 if given else 0.5, shape).astype(np.float32)

    return trees.nest(
        {
            path: jax.device_put(value(path, s.shape), prog.sharding(prog.specs[path]))
            for path, s in prog.shapes.items()
        }
    )


def constant(vocab_size, logits):
    """A model whose logits are these at every position; padding gets a huge logit."""
    prog = program(tiny(vocab_size, tied=False, norm=LayerNorm.Config()))
    rows = prog.experiment.model.vocab_rows
    head = np.zeros((rows, 16))
    head[:vocab_size, 0], head[vocab_size:, 0] = logits, 1e6
    bias = np.eye(16)[0]  # the norm of equal entries is 0, to which its bias is added
    return prog, weights(
        prog, **{"embed_vd": np.ones((rows, 16)), "norm/bias_d": bias, "head_vd": head}
    )


def bigrams(following, length=LENGTH):
    """A model of bytes in which each token of `following` is followed by its value."""
    prog = program(tiny(tied=False, length=length))
    embed, head = np.zeros((2, prog.experiment.model.vocab_rows, 16))
    for i, (token, successor) in enumerate(following.items()):
        embed[token, i] = 1
        head[successor] += 10 * np.eye(16)[i]
    return prog, weights(prog, embed_vd=embed, head_vd=head)


def sampled(prog, params, prompts, report=pytest.fail, **options):
    return generate.texts(prog, params, CODER, prompts, Generate(**options), report)


CASES = {
    "gqa-rope-qknorm": {"attention": Attention.Config(qk_norm=True)},
    "mqa-window-softcap-blockwise": {
        "kv_heads": 1,
        "attention": Attention.Config(window=5, softcap=2.0, bias=True),
    },
    "experts": {
        "layers": 8,
        "ffn": Moe.Config(
            hidden=24, gate=Sigmoid(), dispatch=Dropless(), dense_first=1, every=3
        ),
    },
    "learned-layernorm-unrolled": {
        "kv_heads": 4,
        "positions": Learned(length=LENGTH),
        "norm": LayerNorm.Config(),
        "head_softcap": 3.0,
        "scan": False,
        "remat": "full",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_a_cache_gives_the_logits_of_the_forward_pass(case, monkeypatch):
    if "blockwise" in case:
        monkeypatch.setattr(attend, "SHORT", 0)  # else einsum for rows so short
    prog = program(tiny(vocab_size=40, **CASES[case]))
    M, T, lengths = 9, 16, (2, 16, 9)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (3, max(lengths) + M)).astype(np.int32)
    prompts = [(row[:n], 0) for row, n in zip(tokens, lengths, strict=True)]
    rows = generate.make_rows(prompts, M, LENGTH, 1)
    assert rows.tokens.shape[1] == T
    forced = np.stack([r[n : n + M] for r, n in zip(tokens, lengths, strict=True)])

    @jax.jit
    def both(params):
        model, S = prog.model(params), generate.slots(T, M)
        cached = generate.cache_tokens(jnp.array(rows.lengths), T, S)
        empty = model.empty_cache(3, S)
        ids, start = jnp.array(rows.tokens), jnp.int32(0)
        first, cache = generate.advance(model, ids, start, cached, empty)

        def step(cache, given):
            logits, cache = generate.advance(model, given[0], given[1], cached, cache)
            return cache, logits

        ids = jnp.array(forced.T)[:, :, None]
        _, rest = lax.scan(step, cache, (ids, T + jnp.arange(M)))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        unpadded = Tokens(positions, jnp.ones_like(positions))
        x_BTD, _, _ = model(jnp.array(tokens), unpadded)
        return first, rest, model.logits(x_BTD)[..., :40]

    with sharding.use(prog.layout):
        first, rest, forward = map(np.asarray, both(weights(prog)))
    assert forward.std() > 0.3  # the comparison is of something
    for b, n in enumerate(lengths):
        decoded = np.concatenate([first[b][None], rest[:, b]])
        # 1e-5 of logits of order 1 to 10: sums over keys run in another order.
        np.testing.assert_allclose(decoded, forward[b, n - 1 : n + M], 1e-5, 2e-5)


def test_greedy_is_the_argmax_of_repeated_forward_passes():
    prog = program(tiny())
    params = weights(prog)
    prompts = ["a", "wherefore"]
    rows = [np.r_[EOT, CODER.encode(p)].astype(np.int32) for p in prompts]

    @jax.jit
    def following(params, tokens):  # causal, so the zeros behind do not matter
        positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        given = Tokens(positions, jnp.ones_like(positions))
        model = prog.model(params)
        return model.logits(model(jnp.array(tokens), given)[0]).argmax(-1)

    expected = []
    with sharding.use(prog.layout):
        for row in rows:
            new = []
            while len(new) < 12 and EOT not in new:
                ids = np.zeros((1, LENGTH), np.int32)
                ids[0, : len(row) + len(new)] = [*row, *new]
                new.append(int(following(params, ids)[0, len(row) + len(new) - 1]))
            expected.append([i for i in new if i != EOT])
    settings = Generate(tokens=12, temperature=0.0)
    sample = generate.make_sample(prog, settings, EOT)
    batch = generate.make_rows([(row, 0) for row in rows], 12, LENGTH, 1)
    new, finite = sample(params, batch, jax.random.key(0))
    assert finite
    assert [[i for i in row if i != EOT] for row in np.asarray(new)] == expected
    assert len({*expected[0], *expected[1]}) > 3  # not one token over and over


LOGITS = np.array([1.0, 3.0, 0.5, 2.0, -1.0, 2.5, 0.0, 1.5])


def truncated(temperature, top_k, top_p):
    """The distribution to sample from, written as its definition."""
    p = np.exp(LOGITS / temperature)
    order = np.argsort(-p)
    p[order[top_k or len(p) :]] = 0
    p = p / p.sum()
    if top_p is not None:
        mass = np.cumsum(p[order])
        p[order[np.searchsorted(mass, top_p) + 1 :]] = 0
    return p / p.sum()


def assert_drawn_from(p, ids):
    """No id of probability 0, and a chi-square that chance passes once in 10^5."""
    counts = np.bincount(ids, minlength=len(p))
    assert counts[p == 0].sum() == 0 and len(counts) == len(p)
    expected = p[p > 0] * len(ids)
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    free = len(expected) - 1
    # Wilson & Hilferty 1931: the cube root of chi-square / freedom is nearly normal.
    z = ((chi2 / free) ** (1 / 3) - 1 + 2 / (9 * free)) / np.sqrt(2 / (9 * free))
    assert z < 4.3


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, None, None),
        (2.0, 5, None),
        (0.7, None, 0.9),
        (1.5, 6, 0.6),
        (1.0, 99, 1.0),
    ],
)
def test_frequencies_follow_the_truncated_distribution(temperature, top_k, top_p):
    settings = Generate(temperature=temperature, top_k=top_k, top_p=top_p)
    with sharding.use(program(tiny()).layout):
        keys = jax.random.split(jax.random.key(1), 4000)
        logits = jnp.array(np.tile(LOGITS, (4000, 1)), jnp.float32)
        ids = jax.jit(sampling.choose, static_argnums=0)(settings, logits, keys)
    assert_drawn_from(truncated(temperature, top_k, top_p), np.asarray(ids))


@pytest.mark.parametrize("top_k, top_p", [(None, None), (None, 1e-6), (1, None)])
def test_hardly_any_temperature_or_choice_is_greedy(top_k, top_p):
    temperature = 1.0 if top_k or top_p else 1e-50  # which fp32 rounds to 0
    settings = Generate(temperature=temperature, top_k=top_k, top_p=top_p)
    with sharding.use(program(tiny()).layout):
        keys = jax.random.split(jax.random.key(2), 50)
        logits = jnp.array(np.tile(LOGITS, (50, 1)), jnp.float32)
        ids = sampling.choose(settings, logits, keys)
    assert set(np.asarray(ids).tolist()) == {LOGITS.argmax()}


def test_the_padding_of_the_vocabulary_is_never_drawn():
    """At a temperature where all ids are alike, even those of logit -1e30."""
    settings = Generate(tokens=16, temperature=1e30, top_p=None)
    prog, params = constant(len(LOGITS) + 3, [*LOGITS, -50, -50, -50])
    assert prog.experiment.model.vocab_rows == 16
    eot = 6
    prompt = np.array([eot], np.int32)
    rows = generate.make_rows([(prompt, n) for n in range(300)], 16, LENGTH, 1)
    new, _ = generate.make_sample(prog, settings, eot)(params, rows, jax.random.key(3))
    new = np.asarray(new)
    ended = np.cumsum(new == eot, axis=1)
    assert (new[ended > 0] == eot).all()  # a row that has ended stays so
    drawn = new[(ended - (new == eot)) == 0]  # up to the mark, and it
    assert_drawn_from(np.full(11, 1 / 11), drawn)  # rows draw apart, steps too


PROMPTS = ["to be", "", "a somewhat longer prompt"]
MESHES = [
    ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    # A cache is not split by length: the devices of seq hold the same.
    ("mesh.data=2", "mesh.seq=2", "mesh.tensor=2"),
    # Two kv heads for four devices; a step of one token, which four can't split.
    ("mesh.data=2", "mesh.tensor=4", "mesh.sequence_parallel=true"),
]


@pytest.fixture(scope="module")
def alone():
    """Two samples of each of PROMPTS, all in one batch on one device."""
    prog = program(tiny())
    return sampled(prog, weights(prog), PROMPTS, tokens=10, samples=2, top_k=50)


@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
def test_samples_are_the_same_on_every_mesh(alone, mesh):
    prog = program(tiny(), *mesh)
    found = sampled(prog, weights(prog), PROMPTS, tokens=10, samples=2, top_k=50)
    assert found == alone
    assert len({text for texts in found for text in texts}) == 6


def test_a_sample_depends_on_no_other_prompt_and_no_batch(alone):
    prog = program(tiny(), "mesh.data=1", "eval.batch_size=2")
    prompts = [PROMPTS[1], "other words", PROMPTS[0]]  # 6 rows in batches of 2
    found = sampled(prog, weights(prog), prompts, tokens=10, samples=2, top_k=50)
    assert [found[0], found[2]] == [alone[1], alone[0]]


def test_a_sample_depends_on_its_number_and_the_seed():
    prog, params = constant(8, LOGITS)
    prompt = np.array([0], np.int32)
    rows = generate.make_rows([(prompt, 0), (prompt, 1), (prompt, 0)], 8, LENGTH, 1)
    sample = generate.make_sample(prog, Generate(tokens=8, top_p=None), 9)
    one, again, other = (
        np.asarray(sample(params, rows, jax.random.key(n))[0]) for n in (1, 1, 2)
    )
    assert (one == again).all() and (one[0] == one[2]).all()
    assert (one[0] != one[1]).any() and (one != other).any()


class Prefixed(ByteTokenizer):
    """It takes off a first space, as tokenizers do that put one in front."""

    def decode(self, ids):
        return super().decode(ids).removeprefix(" ")


def test_a_text_ends_at_its_mark_its_length_or_where_the_context_is_full():
    a, space, b, c, d = b"a bcd"
    follow = {EOT: a, a: space, space: b, b: c, c: EOT, d: d}
    prog, params = bigrams(follow, length=8)
    lines = []
    # The mark and "dddd" leave 3 inputs, and the last of them gives a fourth token.
    prompts = ["", "a", "xyzb", "c", "d", "dddd", "ddddddd"]
    expected = ["a bc", " bc", "c", "", "dddddd", "dddd", "d"]
    settings = Generate(temperature=0.0, tokens=6)
    found = generate.texts(prog, params, Prefixed(), prompts, settings, lines.append)
    assert found == [[text] for text in expected]
    (line,) = lines
    assert "generate.tokens=6" in line and "data.length=8" in line and "\n" not in line
    assert sampled(prog, params, []) == []
    with toy.refused("prompt 2", "9 tokens", "data.length=8"):
        sampled(prog, params, ["ab", "aaa\naaaa"])


def test_a_learned_position_beyond_the_context_is_never_read():
    """The short prompt's row runs on after the long one's context is full."""
    prog = program(tiny(length=16, positions=Learned(length=16)))
    params = weights(prog)
    sample = generate.make_sample(prog, Generate(tokens=20, temperature=0.0), EOT)

    def short_beside(length):
        prompts = [(np.arange(n, dtype=np.int32), 0) for n in (1, length)]
        rows = generate.make_rows(prompts, 20, 16, 1)
        new, finite = sample(params, rows, jax.random.key(0))
        assert finite
        return np.asarray(new)[0].tolist()

    assert short_beside(16) == short_beside(1)
    assert EOT not in short_beside(16)[:16]  # it did run on


def test_a_prompt_that_is_no_text_and_weights_that_diverged_are_refused():
    prog, params = bigrams({EOT: 97})
    with toy.refused("prompt 1 is not UTF-8 text", "character 1"):
        sampled(prog, params, ["a\udc80"])
    params["embed_vd"] = params["embed_vd"] * jnp.nan
    with toy.refused("not finite"):
        sampled(prog, params, ["a"], tokens=2, temperature=0.0)


def test_casting_the_weights_before_the_loop_changes_no_logit():
    prog = program(tiny(dtype="bfloat16", norm=LayerNorm.Config(), kv_heads=1))
    params = weights(prog)

    def logits(cast, params):
        model = prog.model(generate.cast_once(prog, params) if cast else params)
        positions = jnp.arange(8)[None]
        ids = jnp.arange(8)[None]
        tokens = Tokens(positions, jnp.ones_like(positions))
        return model.logits(model(ids, tokens)[0])

    # Otherwise XLA's CPU backend may leave out a rounding to bfloat16.
    exact = {"xla_allow_excess_precision": False}
    with sharding.use(prog.layout):
        compiled = jax.jit(logits, static_argnums=0, compiler_options=exact)
        np.testing.assert_array_equal(compiled(True, params), compiled(False, params))
        cast = jax.eval_shape(lambda p: generate.cast_once(prog, p), params)
    kinds = {path: leaf.dtype for path, leaf in trees.flatten(cast).items()}
    assert kinds["layers/mixer/query_dnh"] == jnp.bfloat16
    assert kinds["norm/scale_d"] == jnp.float32
