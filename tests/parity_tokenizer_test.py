"""Tokenizers of exports, as transformers reads them: the same ids, and no warning.

Run with -m parity.
"""

import io
import shutil

import families_hf
import numpy as np
import parity_test
import pytest
import runs

from lm.convert import work
from lm.data import pretrained
from lm.data import tokenizer as tokenizers

transformers = parity_test.transformers
pytestmark = parity_test.pytestmark


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama 2", "imported"),
        ("llama 2", "unigram"),
        ("llama 2", "bpe"),
        ("marian", "bpe"),
    ],
)
def test_tokenizers_that_are_exported_are_what_transformers_reads(tmp_path, name, kind):
    """Those of an import, and those that a run has trained: without a word, with the same ids."""
    one, written = parity_test.made(name), "a bcd  cab\n\tdad, bad: Zwölf ☂"
    if kind == "imported":
        families_hf.write_tokenizer(tmp_path)
        coder = tokenizers.load(pretrained.HuggingFace(path=str(tmp_path)))
    else:
        letters = np.random.default_rng(0).choice(list("abcd  \n,"), 3000)
        chosen = tokenizers.SentencePiece(model_type=kind, character_coverage=1.0)
        coder = tokenizers.train(chosen, 300, ["".join(letters)])
    out, lines = tmp_path / "out", []
    work.send_out(
        *(one.prog.experiment, one.params, coder, str(out), "", one.prog, lines.append)
    )
    assert len(lines) == 1
    with parity_test.listening() as warned:
        theirs = transformers.AutoTokenizer.from_pretrained(str(out))
    assert not warned
    ids = coder.encode(written).tolist()
    assert theirs(written, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == written
    assert theirs.eos_token_id == coder.eot
    if kind != "imported":
        marked = [*ids, coder.eot] if name == "marian" else [coder.eot, *ids]
        assert theirs(written).input_ids == marked


def test_the_pieces_of_t5_come_and_go(tmp_path):
    """There are fewer than ids: transformers has sentinels above them, the model more still."""
    import sentencepiece

    text, made = "The cat sat on a mat, and the dog sat too.", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 40), model_writer=made, vocab_size=40, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    source, workdir, out = (tmp_path / name for name in ("source", "work", "out"))
    shutil.copytree(str(parity_test.made("t5 1.0").folder), source)
    (source / "spiece.model").write_bytes(made.getvalue())
    for options in (
        ["--mode=import", f"--from={source}", "--set=mesh.data=1"],
        ["--mode=export", f"--to={out}"],
    ):
        result = runs.here(*options, f"--workdir={workdir}")
        assert result.code == 0, result.err
    assert (out / "spiece.model").read_bytes() == made.getvalue()
    assert not (out / "tokenizer.model").exists()
    with parity_test.listening() as warned:
        theirs = transformers.AutoTokenizer.from_pretrained(str(out))
    assert not warned
    model = made.getvalue()
    coder = tokenizers.from_files({"tokenizer.model": model})
    ids = coder.encode(text).tolist()
    assert theirs(text).input_ids == [*ids, coder.eot]
    assert coder.size + 100 == len(theirs)
    assert coder.decode([*ids, coder.eot, coder.size + 99]) == text
