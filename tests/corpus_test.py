"""The embedded text is what PROVENANCE.md says, and comes out of TFDS as it went in."""

import functools
import hashlib
import math
import re
import shutil
import statistics
import subprocess
import sys
import unicodedata

import pytest

from lm.config import ConfigError
from lm.data import corpus, sources


@functools.cache
def documents_of(config, dataset="lm_text"):
    return list(corpus.documents(config, dataset))


def counts(config):
    splits = [document["split"] for document in documents_of(config)]
    return tuple(splits.count(split) for split in corpus.SPLITS)


def test_documents_of_each_split():
    assert counts("union") == (211, 11, 11)
    assert counts("shakespeare") == (34, 2, 2)
    assert counts("moby_dick") == (125, 6, 7)
    assert counts("all") == (211 + 34 + 125, 11 + 2 + 6, 11 + 2 + 7)
    assert counts("slice") == (34, 4, 4)


def test_addresses_are_split_by_year():
    for document in documents_of("union"):
        year = int(re.fullmatch(r"union/(\d{4})-[a-z-]+", document["id"])[1])
        since = {"train": 1790, "validation": 2000, "test": 2011}[document["split"]]
        until = {"train": 1999, "validation": 2010, "test": 2021}[document["split"]]
        assert since <= year <= until


def test_no_document_is_in_two_splits_or_twice_in_one():
    every = [documents_of(config) for config in corpus.CONFIGS]
    for documents in every:
        assert len({document["id"] for document in documents}) == len(documents)
        assert len({document["text"] for document in documents}) == len(documents)
    split_of = {document["id"]: document["split"] for document in every[0]}
    for document in [d for documents in every for d in documents]:
        assert split_of[document["id"]] == document["split"]


def test_slice_is_a_megabyte_of_all_three():
    texts = [document["text"].encode() for document in documents_of("slice")]
    assert 0.95e6 < sum(map(len, texts)) < 1.05e6
    for split in corpus.SPLITS:
        ids = [d["id"] for d in documents_of("slice") if d["split"] == split]
        assert {name.split("/")[0] for name in ids} == set(corpus.CONFIGS["all"])


def test_text_is_nfc_and_has_no_control_character_but_line_ends():
    for document in documents_of("all"):
        text = document["text"]
        assert unicodedata.is_normalized("NFC", text)
        control = [c for c in set(text) if unicodedata.category(c).startswith("C")]
        assert control in ([], ["\n"]), document["id"]
        assert text == text.strip() + "\n"


def test_plays_have_no_markup_left():
    for document in documents_of("shakespeare"):
        text = document["text"]
        assert text.startswith(document["title"] + "\n\n")
        assert not re.search(r"[*_#\\<>]|&\w+;", text)
        assert len(re.findall(r"^ACT [IV]+$", text, re.MULTILINE)) == 5
        assert text.count("[") == text.count("]") > 50
        assert len(re.findall(r"\n\n[\w' &-]+:\n", text)) > 400


def test_files_are_those_of_provenance():
    provenance = (corpus.TEXT_DIR / "PROVENANCE.md").read_text()
    sums = (corpus.TEXT_DIR / "SHA256SUMS").read_text().splitlines()
    paths = sorted(corpus.TEXT_DIR.glob("*.xz"))
    assert len(paths) == len(sums) == 4
    for path, line in zip(paths, sums, strict=True):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert line == f"{sha256}  {path.name}"
        name = path.name.split(".")[0]
        bible = name == "bible"
        documents = documents_of(*(("verses", "lm_bible") if bible else (name,)))
        fields = ("en", "es") if bible else ("text",)
        size = sum(len(d[field].encode()) for d in documents for field in fields)
        cells = [
            f"`{path.name}`",
            f"{len(documents)}",
            f"{size:,}",
            f"{path.stat().st_size:,}",
            f"`{sha256}`",
        ]
        assert " | ".join(cells) in provenance


BOOKS = {
    "validation": {
        *("esther", "lamentations", "hosea", "jonah"),
        *("galatians", "i-peter", "i-john"),
    },
    "test": {"ruth", "ecclesiastes", "daniel", "john", "james"},
}


def test_verses_are_split_by_book_and_none_is_in_two_splits():
    verses = documents_of("verses", "lm_bible")
    splits = {s: [v for v in verses if v["split"] == s] for s in corpus.SPLITS}
    assert [len(some) for some in splits.values()] == [28212, 899, 1651]
    books = {s: {v["id"].split("/")[0] for v in some} for s, some in splits.items()}
    assert {s: books[s] for s in BOOKS} == BOOKS
    assert len(books["train"] | BOOKS["validation"] | BOOKS["test"]) == 66
    assert len(books["train"]) == 66 - 12
    for language in ("en", "es"):  # nor is one word for word in a book of another split
        texts = {s: {v[language] for v in some} for s, some in splits.items()}
        assert not texts["train"] & (texts["validation"] | texts["test"])
        assert not texts["validation"] & texts["test"]
    first = {v["id"]: v for v in verses}["genesis/001/001"]
    assert first["en"] == "In the beginning God created the heaven and the earth."
    assert first["es"] == "EN el principio crió Dios los cielos y la tierra."


def test_verses_are_plain_text_and_say_the_same():
    verses = documents_of("verses", "lm_bible")
    assert len({v["id"] for v in verses}) == len(verses)
    for verse in verses:
        for text in (verse["en"], verse["es"]):
            assert unicodedata.is_normalized("NFC", text)
            assert not re.search(r"[<>&¶\n]|  ", text) and text == text.strip()
        # Where numbering differs, verses of other lengths meet: no chapter may do so.
    chapters = {}
    for verse in verses:
        ratio = math.log(len(verse["es"]) / len(verse["en"]))
        chapters.setdefault(verse["id"].rpartition("/")[0], []).append(ratio)
    spread = {c: statistics.pstdev(r) for c, r in chapters.items() if len(r) > 4}
    assert len(spread) > 1100
    assert (
        max(spread.values()) < 0.3
    )  # those left out have 0.31 to 0.58, or lack verses


def test_pairs_of_verses_come_out_of_tfds(tmp_path):
    source = sources.find("tfds:lm_bible#en+es", str(tmp_path))
    assert source.fields == ("en", "es")
    found = [pair for part in source.parts("test") for pair in part.documents()]
    verses = documents_of("verses", "lm_bible")
    assert sorted(found) == sorted(
        (v["en"], v["es"]) for v in verses if v["split"] == "test"
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory in which a fresh interpreter, without a network, prepared `slice`."""
    data_dir = tmp_path_factory.mktemp("tfds")
    code = f"""
import sys
def hook(event, _):
    assert event not in ("socket.connect", "socket.getaddrinfo"), event
sys.addaudithook(hook)
from lm.data import corpus
assert "tensorflow_datasets" not in sys.modules
corpus.prepare("lm_text/slice", {str(data_dir)!r})
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return data_dir


def read(split, data_dir):
    import tensorflow_datasets as tfds

    source = tfds.data_source("lm_text/slice", split=split, data_dir=data_dir)
    return {example["id"].decode(): example for example in source}


def test_tfds_gives_back_every_document(prepared):
    assert "tensorflow" not in sys.modules
    for split in corpus.SPLITS:
        examples = read(split, prepared)
        chosen = [d for d in documents_of("slice") if d["split"] == split]
        assert len(examples) == len(chosen)
        for document in chosen:
            example = examples[document["id"]]
            assert example["text"].decode() == document["text"]
            assert example["title"].decode() == document["title"]


def test_prepared_data_is_left_alone_without_asking_tfds(prepared, monkeypatch):
    files = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    corpus.prepare("lm_text/slice:1.0.0", prepared)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == files


def test_the_slower_of_two_that_prepare_keeps_what_the_faster_made(
    tmp_path, monkeypatch
):
    documents = corpus.documents

    def slow_documents(config, dataset):
        monkeypatch.setattr(corpus, "documents", documents)
        corpus.prepare("lm_text/slice", tmp_path)  # the other one starts and ends
        made.update((p, p.stat().st_ino) for p in final.iterdir())
        return documents(config, dataset)

    made = {}
    final = tmp_path / "lm_text" / "slice" / corpus.VERSION
    monkeypatch.setattr(corpus, "documents", slow_documents)
    corpus.prepare("lm_text/slice", tmp_path)
    assert made and {p: p.stat().st_ino for p in final.iterdir()} == made
    assert list(final.parent.iterdir()) == [final]  # nothing half-written stays
    assert len(read("train", tmp_path)) == counts("slice")[0]


def refusal(name, data_dir):
    with pytest.raises(ConfigError) as caught:
        corpus.prepare(name, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_text_is_reported_and_nothing_written(damage, tmp_path, monkeypatch):
    text = tmp_path / "text"
    shutil.copytree(corpus.TEXT_DIR, text)
    path = text / "moby_dick.jsonl.xz"
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed if damage == "flip" else packed[:-1])
    if damage == "remove":
        path.unlink()
    monkeypatch.setattr(corpus, "TEXT_DIR", text)
    message = refusal("lm_text/slice", tmp_path / "tfds")
    assert str(path) in message and "git checkout" in message
    assert not (tmp_path / "tfds").exists()


def test_unknown_names_and_places_are_refused(tmp_path):
    assert "did you mean 'lm_text/slice'" in refusal("lm_text/slize", tmp_path)
    assert "version 1.0.0" in refusal("lm_text/slice:2.0.0", tmp_path)
    (tmp_path / "file").write_text("")
    message = refusal("lm_text/slice", tmp_path / "file")
    assert str(tmp_path / "file") in message and "data.tfds_dir" in message
