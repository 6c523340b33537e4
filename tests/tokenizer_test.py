"""Tokenizers are exact inverses, trained to the same model on any machine."""

import functools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import corpus, tokenizer
from lm.data.tokenizer import Bytes, SentencePiece

SIZE = 400
KINDS = ("unigram", "bpe")
NAMES = ("bytes", *KINDS)


@functools.cache
def texts():
    found = [d["text"][:5000] for d in corpus.documents("slice")][::10]
    return [*found, "Äpfel,  Öl und Übermut:\t1 234,50 € \u2013 na klar.\n" * 4]


@functools.cache
def coder_of(name):
    if name == "bytes":
        return tokenizer.load(Bytes())
    return tokenizer.train(SentencePiece(model_type=name), SIZE, texts())


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(st.characters(codec="utf-8")) | st.text(" \n\t\u2581<>0xeot/sA"))
@example(
    text="  the  fox\n\n\n\t \U0001f600\u200d\U0001f525 नमस्ते 日本語 \u3000 e\u0301 \0"
)
@example(text="<s></s><eot><unk><0x41> \u2581\u2585\u2047 \u2581")
@settings(max_examples=150, deadline=None)
def test_decoding_what_was_encoded_gives_the_text_back(name, text):
    coder = coder_of(name)
    ids = coder.encode(text)
    assert coder.decode(ids) == text
    assert ids.dtype == np.int32
    assert coder.eot not in ids
    assert all(0 <= i < coder.size for i in ids)
    assert coder.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_comes_back_too(name):
    coder = coder_of(name)
    text = "\u2581 whale \n" * 20_000
    assert coder.decode(coder.encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_is_made_again_from_its_files(name):
    coder = coder_of(name)
    again = tokenizer.from_files(coder.files())
    assert (again.size, again.eot, again.fingerprint) == (
        coder.size,
        coder.eot,
        coder.fingerprint,
    )
    assert [list(i) for i in again.encode_batch(texts())] == [
        list(coder.encode(t)) for t in texts()
    ]
    assert (
        coder.token_bytes.shape == (coder.size,) and coder.token_bytes[coder.eot] == 0
    )
    assert coder.decode([*coder.encode("a"), coder.eot, *coder.encode("b")]) == "ab"
    assert len({coder_of(n).fingerprint for n in NAMES}) == 3


def test_newlines_and_runs_of_spaces_are_learned():
    for coder in map(coder_of, KINDS):
        assert len(coder.encode("\n")) == 1
        assert len(coder.encode("; the\n\n")) < 7


def test_training_on_one_core_gives_the_same_model():
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from lm.data import tokenizer\n"
        "texts = eval(sys.stdin.read())\n"
        "for kind in ('unigram', 'bpe'):\n"
        "    config = tokenizer.SentencePiece(model_type=kind)\n"
        f"    print(tokenizer.train(config, {SIZE}, texts).fingerprint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=repr(texts()),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert done.stdout.split() == [coder_of(kind).fingerprint for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_does_not_fit_is_told_with_one_that_does(kind, capfd):
    config = SentencePiece(model_type=kind)

    def size_told(vocab_size, word):
        with pytest.raises(ConfigError, match=word) as error:
            tokenizer.train(config, vocab_size, texts())
        assert "\n" not in str(error.value)
        found = re.search(r"--set model.vocab_size=(\d+)", str(error.value))
        assert found
        return int(found[1])

    largest = size_told(100_000, "larger than the text allows")
    assert tokenizer.train(config, largest, texts()).size == largest
    assert size_told(largest + 1, "larger") == largest
    smallest = size_told(260, "too small")
    assert tokenizer.train(config, smallest, texts()).size == smallest
    assert size_told(smallest - 1, "too small") == smallest
    assert capfd.readouterr() == (
        "",
        "",
    )  # the library's chatter stays off the terminal


def test_no_text_no_model_and_another_size_are_told(tmp_path):
    with pytest.raises(ConfigError, match="no text"):
        tokenizer.train(SentencePiece(), 300, [])
    with pytest.raises(ConfigError, match=r"none\.model can't be read \(No such file"):
        tokenizer.load(SentencePiece(path=str(tmp_path / "none.model")))
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"bad\.model is not a SentencePiece model"):
        tokenizer.load(SentencePiece(path=str(tmp_path / "bad.model")))
    with pytest.raises(ConfigError, match=r"--set model\.vocab_size=257"):
        tokenizer.sizes_agree(coder_of("bytes"), 256)
    with pytest.raises(ConfigError, match="character_coverage=0"):
        SentencePiece(character_coverage=0.0)


def test_a_model_file_is_loaded(tmp_path):
    coder = coder_of("unigram")
    (tmp_path / "my.model").write_bytes(coder.files()["tokenizer.model"])
    loaded = tokenizer.load(SentencePiece(path=str(tmp_path / "my.model")))
    assert loaded.fingerprint == coder.fingerprint
