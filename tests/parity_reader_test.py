"""Encoders beside decoders against transformers: logits, loss, gradients, greedy text, files.

As tests/parity_test.py, whose models they are made like. Run with -m parity.
"""

import functools

import families_hf
import jax
import jax.numpy as jnp
import numpy as np
import parity_test
import pytest
import toy

from lm import generate, gradients, sharding
from lm.experiment import Generate

torch = parity_test.torch
pytestmark = parity_test.pytestmark
NAMES = list(families_hf.READERS)
LENGTH, TARGETS, NEW = 40, 32, 24  # tokens; the last distance that is told apart is 11
REAL = {"inputs": np.array([40, 27, 9]), "tokens": np.array([20, 32, 3])}


@functools.cache
def batch(name, side="right"):
    """Pairs, one a row, each text of its own length; what is read has its padding on a side."""
    vocab = parity_test.made(name).prog.experiment.model.vocab_size
    rng = np.random.default_rng(1)
    ids = rng.integers(3, vocab, (3, LENGTH)).astype(np.int32)
    there = np.arange(LENGTH)[None] < REAL["inputs"][:, None]
    if side == "left":
        there = there[:, ::-1]
    targets = rng.integers(3, vocab, (3, TARGETS)).astype(np.int32)
    written = np.arange(TARGETS)[None] < REAL["tokens"][:, None]
    begun = np.roll(targets, 1, 1)
    begun[:, 0] = 5  # whatever it is: the model has a start of its own
    segments = there.astype(np.int32)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    if name.startswith("marian"):  # theirs counts the padding, too
        positions = np.broadcast_to(np.arange(LENGTH), ids.shape)
    return {
        "inputs": ids,
        "input_segments": segments,
        "input_positions": positions.astype(np.int32),
        "tokens": begun,
        "targets": targets,
        "segments": written.astype(np.int32),
        "positions": (np.arange(TARGETS) * written).astype(np.int32),
        "weights": written.astype(np.float32),
        "bytes": np.ones(3, np.int32),
        "index": np.arange(3, dtype=np.uint32),
    }


def theirs(model, host):
    """What transformers computes; it shifts the labels itself."""
    labels = np.where(host["weights"] > 0, host["targets"], -100)
    return model(
        input_ids=torch.tensor(host["inputs"], dtype=torch.long),
        attention_mask=torch.tensor(host["input_segments"], dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_beside_padding(name, side):
    one, host = parity_test.made(name), batch(name, side)
    with torch.no_grad():
        expected = theirs(one.model, host).logits.numpy()

    @jax.jit
    def run(params, host):
        model = one.prog.model(params)
        return model.logits(model.read(host, None, True)[0])

    with sharding.use(one.prog.layout):
        found = np.asarray(run(one.params, toy.place(one.prog, host)))
    there = host["segments"] > 0
    assert np.abs(expected[there]).max() > 0.3
    np.testing.assert_allclose(
        found[there][:, : expected.shape[-1]],
        expected[there],
        atol=parity_test.TOLERANCE,
        rtol=parity_test.TOLERANCE,
    )


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_are_the_same(name):
    one, host = parity_test.made(name), batch(name)
    one.model.zero_grad()
    loss = theirs(one.model, host).loss
    loss.backward()

    def of(params, batch):
        count = batch["weights"].sum()
        return gradients.of(one.prog, params, batch, jnp.int32(0), count)

    sums, grads = one.prog.compiled(of)(one.params, toy.place(one.prog, host))
    assert abs(float(sums["loss"]) / loss.item() - 1) < parity_test.TOLERANCE
    parity_test.same_gradients(one, grads)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_the_same_token_for_token(name):
    """From texts of several lengths, further than distances are told apart, by the cache."""
    one, host = parity_test.made(name), batch(name)
    expected = one.model.generate(
        torch.tensor(host["inputs"], dtype=torch.long),
        attention_mask=torch.tensor(host["input_segments"], dtype=torch.long),
        do_sample=False, max_new_tokens=NEW, eos_token_id=None,
    )[:, 1:].numpy()  # fmt: skip
    sample = generate.make_sample(one.prog, Generate(tokens=NEW, temperature=0.0), -1)
    texts = [ids[:n] for ids, n in zip(host["inputs"], REAL["inputs"], strict=True)]
    rows = generate.make_rows([(ids, 0) for ids in texts], NEW, LENGTH + NEW, 1)
    found, finite = sample(one.params, rows, jax.random.key(0))
    assert finite
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(np.asarray(found)[:3], expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_what_transformers_reads(name):
    one, (again, warned) = parity_test.made(name), parity_test.exported(name)
    # Of 1.1 it says that the head is not the embedding, though it believes it is.
    assert all("tie" in line for line in warned)
    with torch.no_grad():
        both = [theirs(m, batch(name)).logits.numpy() for m in (again, one.model)]
    np.testing.assert_allclose(*both, atol=1e-5)
