"""Sources give every document once, in order, and say what is wrong with a file."""

import json
import os
import socket
import sys
import unicodedata

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations import memory
from hypothesis import given
from hypothesis import strategies as st

from lm.config import ConfigError
from lm.data import cleaning, corpus, sources

TEXTS = ["one\n", "zwei \u2013 ü", "", "  drei\n\nvier", "\u2028 \u20ac", "six"]


def documents(source, split="train"):
    """The texts of documents of one field."""
    return [text for part in source.parts(split) for [text] in part.documents()]


def write_jsonl(path, texts):
    lines = [json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)]
    path.write_text(
        "\n\n".join(lines), "utf-8"
    )  # blank lines, and no newline at the end


def test_text_is_a_document_a_file_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in [
        ("b/1.txt", "two"),
        ("a.txt", "one"),
        ("c.txt", "three"),
        ("d.md", "x"),
    ]:
        (tmp_path / name).write_text(text)
    assert documents(sources.find(f"text:{tmp_path}/**/*.txt")) == [
        "one",
        "two",
        "three",
    ]
    assert documents(sources.find(f"text:{tmp_path}/?.txt")) == ["one", "three"]
    assert documents(sources.find(f"text:{tmp_path}/d.md")) == ["x"]


@pytest.mark.parametrize("size", [1, 7, 40, 1 << 20])
def test_parts_of_any_size_hold_every_document_once(tmp_path, monkeypatch, size):
    monkeypatch.setattr(sources, "_PART", size)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[::-1])
    found = sources.find(f"jsonl:{tmp_path}/*.jsonl#text")
    assert documents(found) == TEXTS + TEXTS[::-1]
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    assert documents(sources.find(f"text:{tmp_path}/*.txt")) == TEXTS


def test_a_fingerprint_is_the_content_wherever_it_lies(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    os.utime(tmp_path / "there" / "a.txt", (1, 1))
    here, there = (
        (lambda: sources.find(f"text:{tmp_path}/here/*").fingerprint("train")),
        (lambda: sources.find(f"text:{tmp_path}/there/*").fingerprint("train")),
    )
    assert here() == there()
    monkeypatch.setattr(
        sources, "_HASHED", 0
    )  # as for much text: names, sizes and times
    assert here() != there()
    monkeypatch.undo()
    (tmp_path / "there" / "a.txt").write_text("tExt")
    assert here() != there()


BAD = {
    "not UTF-8": (
        b'{"text": "ok"}\n{"text": "\xff"}',
        ["bad.jsonl", "byte 25", "0xff"],
    ),
    "not JSON": (b'{"text": "ok"}\n\n{"text": }\n', ["bad.jsonl:3:", "column 10"]),
    "no object": (b"[1]", ["bad.jsonl:1:", "list"]),
    "no field": (
        b'{"text": "ok"}\n{"texts": 1}',
        ["bad.jsonl:2:", "'text'", "'texts'"],
    ),
    "no string": (b'{"text": 3}', ["bad.jsonl:1:", "int"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_in_one_line(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        documents(sources.find(f"jsonl:{tmp_path}/bad.jsonl"))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match=r"latin.txt: not UTF-8 at byte 3 \(0xe9"):
        documents(sources.find(f"text:{tmp_path}/*.txt"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:DIR/*.txt", "no file matches DIR"),
        ("text:DIR/none.txt", "no file matches"),
        ("books/*.txt", "expected tfds:NAME, text:GLOB"),
        ("tfds:lm1b", "not prepared under DIR; prepare it with `tfds build lm1b"),
        ("tfds:lm1bb", "has no data set 'lm1bb'; did you mean 'lm1b'"),
        ("tfds:lm_text/slise", "did you mean 'lm_text/slice'"),
    ],
)
def test_a_source_that_is_not_there_is_told_without_the_network(
    tmp_path, monkeypatch, spec, message
):
    def no_network(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(ConfigError) as error:
        sources.find(spec.replace("DIR", str(tmp_path)), str(tmp_path))
    assert message.replace("DIR", str(tmp_path)) in str(error.value)
    assert "\n" not in str(error.value)


def test_tfds_is_read_by_split_and_slice_without_tensorflow(tmp_path, monkeypatch):
    source = sources.find("tfds:lm_text/slice", str(tmp_path))
    assert source.own_splits
    texts = documents(source)
    assert len(texts) > 10 and all(texts)
    assert documents(source, "train[3:5]") == texts[3:5]
    assert not set(documents(source, "validation")) & set(texts)
    assert source.fingerprint("train") != source.fingerprint("validation")
    assert "tensorflow" not in sys.modules
    from lm.data import tfds_source

    monkeypatch.setattr(tfds_source, "_PART", 1)
    assert documents(source) == texts and len(source.parts("train")) > 10
    for split in ("trian", "train[:x]"):
        with pytest.raises(ConfigError) as error:
            source.parts(split)
        assert split in str(error.value) and "\n" not in str(error.value)


class Bucket(memory.MemoryFileSystem):
    """A bucket in memory, in place of Google's."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


def test_text_may_be_remote():
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()  # another test's bucket
    Bucket().pipe_file("gs://bucket/books/a.txt", b"one")
    Bucket().pipe_file("gs://bucket/books/b.txt", b"two")
    assert documents(sources.find("text:gs://bucket/books/*.txt")) == ["one", "two"]


@given(st.text(st.characters(codec=None)))
def test_cleaning_twice_is_cleaning_once(text):
    for config in (cleaning.Cleaning(), cleaning.Cleaning(nfc=False, control=False)):
        once = config.clean(text)
        assert config.clean(once) == once
        once.encode()  # no surrogates
    clean = cleaning.Cleaning().clean(text)
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in clean)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\ufeffa\r\nb\rc\x85d\u2028e", "a\nb\nc\nd\ne"),
        ("a\0\x07\x0b\x7fb\tc", "ab\tc"),
        ("e\u0301", "\u00e9"),
        ("e\0\u0301", "\u00e9"),  # what a control character kept apart
        (" \n\t\u3000", ""),
        ("\ud800x", "\ufffdx"),
    ],
)
def test_what_cleaning_does(raw, clean):
    assert cleaning.Cleaning().clean(raw) == clean


def test_a_step_of_cleaning_can_be_left_out():
    assert cleaning.Cleaning(line_ends=False, control=False).clean("a\r\n") == "a\r\n"
    assert cleaning.Cleaning(nfc=False).clean("e\u0301") == "e\u0301"


def test_a_text_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "word " * 30 + "\n\n" for i in range(50)]
    (tmp_path / "book.txt").write_text("".join(paragraphs))
    source = sources.find(f"text:{tmp_path}/book.txt#1k")
    pieces = documents(source)
    assert "".join(pieces) == "".join(paragraphs)  # nothing lost, nothing twice
    assert len(pieces) > 5
    assert all(1024 <= len(p) <= 2048 and p.endswith("\n\n") for p in pieces[:-1])
    whole = sources.find(f"text:{tmp_path}/book.txt")
    assert whole.fingerprint("train") != source.fingerprint("train")


def fields_of(source, split="train"):
    return [d for part in source.parts(split) for d in part.documents()]


def test_a_document_may_have_several_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PART", 20)
    rows = [{"text": f"text {i}", "label": i % 2, "to": "x"} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sources.find(f"jsonl:{path}#text+label")
    assert found.fields == ("text", "label")
    assert fields_of(found) == [(r["text"], str(r["label"])) for r in rows]
    other = sources.find(f"jsonl:{path}#text+to")
    assert found.fingerprint("train") != other.fingerprint("train")
    for spec, message in [
        (f"jsonl:{path}#label+text", "field 'label' is int, not text"),
        (f"jsonl:{path}#text+lable", "no field 'lable'; did you mean 'label'"),
        (f"jsonl:{path}#text+", "expected one name or several different ones"),
        (f"jsonl:{path}#text+text", "several different ones"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fields_of(sources.find(spec))


def test_labels_of_tfds_are_their_names(tmp_path):
    import tensorflow_datasets as tfds

    class Mail(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "lm.data.corpus"  # TFDS looks for the package of a builder
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["ham", "spam"])
            features = {"text": tfds.features.Text(), "label": label, "n": np.int32}
            found = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=found)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"text": f"text {i}", "label": i % 2, "n": i}

    with corpus._quiet():
        Mail(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    found = fields_of(sources.find("tfds:mail#text+label", str(tmp_path)))
    assert sorted(found) == [(f"text {i}", ("ham", "spam")[i % 2]) for i in range(4)]
    numbers = fields_of(sources.find("tfds:mail#text+n", str(tmp_path)))
    assert sorted(numbers) == [(f"text {i}", str(i)) for i in range(4)]
    with pytest.raises(ConfigError, match="feature 'n' is int, not text"):
        fields_of(sources.find("tfds:mail#n+text", str(tmp_path)))
    with pytest.raises(ConfigError, match="no feature 'lable'; did you mean 'label'"):
        sources.find("tfds:mail#text+lable", str(tmp_path))
