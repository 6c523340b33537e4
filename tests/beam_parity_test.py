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
EARLY = {"full": True, "heuristic": False, "never": "never"}


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("beams, penalty", [(2, 0.0), (4, 1.0), (5, 1.3), (3, -1.0)])
@pytest.mark.parametrize("name", ["gpt2", "llama 3, tied"])
def test_beams_are_those_of_transformers(name, beams, penalty, early):
    """All the texts of every prompt; half of the ids end one, so that many do."""
    one = parity_test.made(name)
    prompts = [parity_test.tokens(name)[b, :n].copy() for b, n in enumerate(LENGTHS)]
    there = np.arange(LONGEST)[None] >= LONGEST - np.array(LENGTHS)[:, None]
    ids = np.zeros((3, LONGEST), np.int64)
    for b, prompt in enumerate(prompts):
        ids[b, LONGEST - len(prompt) :] = prompt
    stops = [2, *range(10, 150)]
    expected = one.model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(there.astype(np.int64)),
        do_sample=False, num_beams=beams, num_return_sequences=beams,
        length_penalty=penalty, early_stopping=EARLY[early],
        max_new_tokens=NEW, pad_token_id=2, eos_token_id=stops,
    )[:, LONGEST:].numpy()  # fmt: skip
    expected = np.pad(
        expected, ((0, 0), (0, NEW - expected.shape[1])), constant_values=2
    )
    chosen = Generate(
        tokens=NEW, temperature=0.0, beams=beams, samples=beams,
        length_penalty=penalty, early_stop=early,
    )  # fmt: skip
    sample = generate.make_sample(one.prog, chosen, stops[0], stops)
    rows = generate.make_rows([(p, 0) for p in prompts], NEW, 64, 1)
    found, finite = sample(one.params, rows, jax.random.key(0))
    assert finite
    np.testing.assert_array_equal(np.asarray(found).reshape(-1, NEW), expected)
    sizes = (~np.isin(expected, stops)).sum(1)
    assert len(set(sizes)) > 1, "texts of one length say nothing of penalties"
