"""Beam search finds the best texts, and neither mesh nor neighbours change them."""

import itertools

import generate_test as sampling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lm import generate, sharding
from lm.experiment import Generate

EOT, VOCAB, NEW = 0, 5, 3


def every_text(prog, params, prompt, penalty):
    """Scores of all texts of up to NEW tokens, by forward passes, the best first."""
    texts = [
        text
        for n in range(1, NEW + 1)
        for text in itertools.product(range(VOCAB), repeat=n)
        if EOT not in text[:-1] and (n == NEW or text[-1] == EOT)
    ]
    apart = generate.reads(prog)
    begin = [EOT] if apart else list(prompt)
    given = np.zeros((len(texts), len(begin) + NEW), np.int32)
    for row, text in zip(given, texts, strict=True):
        row[: len(begin) + len(text)] = [*begin, *text]
    rows = {"tokens": given, "positions": np.cumsum(np.ones_like(given), 1) - 1}
    if apart:
        read = np.tile(np.roll(prompt, -1), (len(texts), 1))
        rows |= {
            "inputs": read,
            "input_positions": np.cumsum(np.ones_like(read), 1) - 1,
        }
        rows["input_segments"] = np.ones_like(read)

    @jax.jit
    def log_probs(params, rows):
        model = prog.model(params)
        x_BTD, _ = model.read(rows, None, True)
        return jax.nn.log_softmax(model.logits(x_BTD)[..., :VOCAB])

    rows = {name: a.astype(np.int32) for name, a in rows.items()}
    with sharding.use(prog.layout):
        ones = {"segments": np.ones_like(given)}
        found = np.asarray(log_probs(params, jax.tree.map(jnp.array, {**rows, **ones})))
    at = len(begin) - 1
    scores = [
        sum(log_p[at + i, token] for i, token in enumerate(text)) / len(text) ** penalty
        for log_p, text in zip(found.astype(np.float64), texts, strict=True)
    ]
    return sorted(zip(scores, texts, strict=True), reverse=True)


RECURRENT = ["model=Recurrent", "model.layers=2", "model.dim=16"]
APART = ["model=EncoderDecoder", "objective=Seq2Seq", "data.packing=documents"]
APART += ["model.norms=post", "model.positions=Sinusoidal"]
KINDS = [(0.0, []), (1.0, APART), (-1.0, RECURRENT)]


@pytest.mark.parametrize("penalty, sets", KINDS)
def test_enough_beams_find_the_best_of_all_texts(penalty, sets):
    """What a model keeps of a text, keys and values or a state, goes with its beam."""
    prog = sampling.program(sampling.tiny(vocab_size=VOCAB), *sets, "mesh.data=1")
    params = sampling.weights(prog, seed=2)
    chosen = Generate(
        tokens=NEW, temperature=0, beams=VOCAB**2, samples=8, length_penalty=penalty,
        early_stop="never",
    )  # fmt: skip
    prompts = [np.array(p, np.int32) for p in ([0, 3, 1], [0], [0, 2, 2, 4])]
    turned = [np.roll(p, -1) if generate.reads(prog) else p for p in prompts]
    rows = generate.make_rows([(p, 0) for p in turned], NEW, sampling.LENGTH, 1)
    sample = generate.make_sample(prog, chosen, EOT)
    found, finite = sample(params, rows, jax.random.key(0))
    assert finite
    for new_NM, prompt in zip(np.asarray(found), prompts, strict=True):
        best = every_text(prog, params, prompt, penalty)[:8]
        assert len({len(text) for _, text in best}) > 1 or penalty
        wanted = [[*text, *[EOT] * (NEW - len(text))] for _, text in best]
        np.testing.assert_array_equal(new_NM, wanted)


@pytest.fixture(scope="module")
def alone():
    """The texts of three prompts in a batch of their own, on one device."""
    prog = sampling.program(sampling.tiny())
    return searched(prog, sampling.PROMPTS)


def searched(prog, prompts):
    how = {"tokens": 8, "temperature": 0.0, "beams": 3, "samples": 3}
    return sampling.sampled(prog, sampling.weights(prog), prompts, **how)


MESHES = [
    *sampling.MESHES[:2],
    ("mesh.pipe=2", "mesh.data=2", "mesh.tensor=2", "pipeline.microbatches=2"),
]


@pytest.mark.parametrize("mesh", MESHES, ids=" ".join)
def test_beams_are_the_same_on_every_mesh(alone, mesh):
    assert searched(sampling.program(sampling.tiny(), *mesh), sampling.PROMPTS) == alone
    assert len({text for texts in alone for text in texts}) == 9


def test_beams_of_what_an_encoder_read_are_the_same_on_a_mesh():
    mesh = MESHES[0]
    one, many = (
        searched(sampling.program(sampling.tiny(), *APART, *more), sampling.PROMPTS)
        for more in (["mesh.data=1"], mesh)
    )
    assert one == many and len({text for texts in one for text in texts}) > 3


def test_beams_depend_on_no_other_prompt_and_no_batch(alone):
    prog = sampling.program(sampling.tiny(), "mesh.data=1", "eval.batch_size=7")
    first, second = sampling.PROMPTS[:2]
    found = searched(prog, [second, "other words", first])  # 7 rows: two prompts
    assert [found[2], found[0]] == alone[:2]


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"beams": 4}, ("generate.beams=4", "temperature=0.8", "temperature=0")),
        ({"beams": 4, "temperature": 0, "top_k": 5}, ("top_k=5", "top_k=none")),
        ({"beams": 2, "temperature": 0, "samples": 3}, ("samples=3", "beams=3")),
        ({"beams": 0}, ("generate.beams=0", "1 or more")),
        ({"length_penalty": 0.6}, ("length_penalty=0.6", "beams=4")),
        ({"early_stop": "never"}, ("early_stop=never", "beams=4")),
        (
            {"beams": 2, "temperature": 0, "length_penalty": 99.0},
            ("length_penalty=99.0", "-5 to 5"),
        ),
    ],
)
def test_beams_that_make_no_sense_are_refused(changed, words):
    with toy.refused(*words):
        Generate(**changed)
