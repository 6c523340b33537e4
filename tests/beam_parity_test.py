"""Beam search against that of transformers, token for token, in fp32. Run with -m parity."""

import jax
import numpy as np
import parity_test
import pytest

from lm import generate
from lm.experiment import Generate

torch = parity_test.torch
pytestmark = parity_test.pytestmark

LENGTHS, LONGEST, NEW = (14, 5, 9), 14, 16
STOPS = [2, *range(10, 150)]  # half of the ids end a text, so that many do
EARLY = {"full": True, "heuristic": False, "never": "never"}
CASES = [(2, 0.0), (4, 1.0), (5, 1.3), (3, -1.0)]


def same_beams(name, beams, penalty, early, first):
    """All the texts of every prompt are the same; `first` is where new tokens begin."""
    one = parity_test.made(name)
    vocab = one.prog.experiment.model.vocab_size
    random = np.random.default_rng(1).integers(150, vocab, (3, LONGEST))
    prompts = [random[b, :n].astype(np.int32) for b, n in enumerate(LENGTHS)]
    place, sizes = np.arange(LONGEST)[None], np.array(LENGTHS)[:, None]
    # What is read whole has its padding at the end: some count positions from the row's beginning.
    there = place < sizes if first == 1 else place >= LONGEST - sizes
    ids = np.zeros((3, LONGEST), np.int64)
    ids[there] = np.concatenate(prompts)
    expected = one.model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(there.astype(np.int64)),
        do_sample=False, num_beams=beams, num_return_sequences=beams,
        length_penalty=penalty, early_stopping=EARLY[early],
        max_new_tokens=NEW, pad_token_id=2, eos_token_id=STOPS,
        use_cache=first > 1,  # theirs has a layer too few for T5's decoder
    )[:, first:].numpy()  # fmt: skip
    expected = np.pad(
        expected, ((0, 0), (0, NEW - expected.shape[1])), constant_values=2
    )
    chosen = Generate(
        tokens=NEW, temperature=0.0, beams=beams, samples=beams,
        length_penalty=penalty, early_stop=early,
    )  # fmt: skip
    sample = generate.make_sample(one.prog, chosen, STOPS[0], STOPS)
    rows = generate.make_rows([(p, 0) for p in prompts], NEW, 64, 1)
    found, finite = sample(one.params, rows, jax.random.key(0))
    assert finite
    np.testing.assert_array_equal(np.asarray(found).reshape(-1, NEW), expected)
    sizes = (~np.isin(expected, STOPS)).sum(1)
    assert len(set(sizes)) > 1, "texts of one length say nothing of penalties"


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("beams, penalty", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama 3, tied"])
def test_beams_are_those_of_transformers(name, beams, penalty, early):
    same_beams(name, beams, penalty, early, LONGEST)


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("beams, penalty", CASES)
@pytest.mark.parametrize("name", ["t5 1.0", "marian"])
def test_beams_of_what_was_read_are_those_of_transformers(name, beams, penalty, early):
    same_beams(name, beams, penalty, early, 1)
